"""`hosl bench memory`: what a client's step takes at most, for every method, against plain first-order and a forward.

Every figure is of a process of its own that holds a client half and no server (`bench_alone`): tensors, weights and
optimiser state included, and the process as the system counts it, from loading on.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hosl.bench.isolated_client import client_alone
from hosl.bench.random_halves import random_halves
from hosl.errors import FailureError
from hosl.methods.rows import FIRST_ORDER, FORWARD, Row

_MIB = 2**20


def bench_memory(
    shape: str,
    cut: int,
    batch_rows: int,
    tokens: int,
    directions: int,
    rows: Sequence[Row],
    say: Callable[[str], None] = lambda text: None,
    *,
    steps: int = 1,
) -> dict[str, Any]:
    """Measure; `say` is told what is under way. A method that does not fit has its error in place of figures.

    `steps`: see `client_alone`.

    Raises:
        FailureError: if the shape is unknown, or nothing at all can be measured.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        half = random_halves(shape, cut, Path(name)) / "client"
        for place, row in enumerate(rows):
            say(f"{place + 1} of {len(rows)}: {row.name}")
            try:
                found[row.name] = client_alone(
                    row.config(cut=cut, directions=directions), half, batch_rows, tokens, steps
                )
            except FailureError as error:
                found[row.name] = {"failed": str(error)}
    measured = {name: figures for name, figures in found.items() if "failed" not in figures}
    if not measured:
        raise FailureError(next(iter(found.values()))["failed"])
    first, plain = measured.get(FIRST_ORDER.name), measured.get(FORWARD.name)
    lines = [
        {"name": name, **(memory_of(figures, plain, first) if name in measured else figures)}
        for name, figures in found.items()
    ]
    return {
        "shape": shape, "cut": cut, "rows": batch_rows, "tokens": tokens, "directions": directions,
        "methods": lines,
    }  # fmt: skip


def memory_of(
    figures: Mapping[str, Any],
    plain: Mapping[str, Any] | None,
    first: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A row's MiB, its ratios to a forward pass, and how many times less than first-order it takes.

    Args:
        figures: of `client_alone`.
        plain: the same of the client that only makes a forward pass; None: it was not measured.
        first: the same of plain first-order; None: it was not measured.
    """
    found = {
        "tensor_peak_mib": round(figures["tensor_peak_bytes"] / _MIB, 1),
        "process_peak_mib": round(figures["process_peak_bytes"] / _MIB, 1),
        "held_mib": round(figures["held_bytes"] / _MIB, 1),
        "tensors_over_forward": round(figures["tensor_peak_bytes"] / figures["forward_peak_bytes"], 3),
    }
    if plain is not None:
        found["process_over_forward"] = round(figures["process_peak_bytes"] / plain["process_peak_bytes"], 3)
    if first is not None:
        found["tensors_less_than_first_order"] = round(
            first["tensor_peak_bytes"] / figures["tensor_peak_bytes"], 2
        )
        found["process_less_than_first_order"] = round(
            first["process_peak_bytes"] / figures["process_peak_bytes"], 2
        )
    return found
