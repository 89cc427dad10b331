"""The numbers of a zeroth-order update, K seeds and K scales: what arrives from a peer is checked before it is used."""

from collections.abc import Sequence

from hosl.core.estimators import LARGEST_NUMBER, MOST_DIRECTIONS
from hosl.errors import LimitError, WireError


def check_update(seeds: Sequence[int], numbers: Sequence[float]) -> None:
    """Refuse what can be no update, of a client or of a round: `seeds`, and the scale or coefficient of each.

    Raises:
        WireError: if the two differ in length, or a number is NaN or as good as infinite.
        LimitError: if there are more than `MOST_DIRECTIONS`.
    """
    if len(seeds) != len(numbers):
        raise WireError(
            f"an update has one number per seed, got {len(seeds)} seeds and {len(numbers)} numbers"
        )
    if len(seeds) > MOST_DIRECTIONS:
        raise LimitError(
            f"an update has at most {MOST_DIRECTIONS} directions, got {len(seeds)}; set zo.directions lower"
        )
    if not all(abs(number) < LARGEST_NUMBER for number in numbers):  # NaN is not below it either
        raise WireError(
            f"an update holds NaN, Inf or a number beyond {LARGEST_NUMBER:.0e}; the sender has diverged: lower its "
            "learning rate or epsilon"
        )
