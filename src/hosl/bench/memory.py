"""`hosl bench memory`: the peak memory of a client's step, for every method, against plain first-order and a forward.

Every figure is that of a process of its own that holds a client half and no server (`isolated_client`): tensors with
weights and optimiser state, and the process as the system counts it, loading included.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hosl.bench.isolated_client import client_alone
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.errors import FailureError
from hosl.methods.variants import FIRST_ORDER, FORWARD, Variant

_MIB = 2**20


def bench_memory(
    sizes: BenchSizes,
    directions: int,
    variants: Sequence[Variant],
    say: Callable[[str], None] = lambda text: None,
    *,
    steps: int = 1,
) -> dict[str, Any]:
    """Measure every variant; returns the settings, and under `methods` a row per variant (`memory_row`).

    A variant that does not fit has its error in place of figures.

    Args:
        sizes: the model and the batch.
        directions: random directions of a step.
        variants: the rows of the table.
        say: is called with one line of progress per variant.
        steps: see `client_alone`.

    Raises:
        FailureError: if the shape is unknown, or no variant can be measured.
    """
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        half = random_halves(sizes, Path(name)) / "client"
        for number, variant in enumerate(variants, start=1):
            say(f"{number} of {len(variants)}: {variant.name}")
            config = variant.config(cut=sizes.cut, directions=directions)
            try:
                figures[variant.name] = client_alone(config, half, sizes.rows, sizes.tokens, steps)
            except FailureError as error:
                figures[variant.name] = {"failed": str(error)}
    measured = {name: of_one for name, of_one in figures.items() if "failed" not in of_one}
    if not measured:
        raise FailureError(next(iter(figures.values()))["failed"])
    first, plain = measured.get(FIRST_ORDER.name), measured.get(FORWARD.name)
    rows = [
        {"name": name, **(memory_row(of_one, plain, first) if name in measured else of_one)}
        for name, of_one in figures.items()
    ]
    return {**sizes.facts(), "directions": directions, "methods": rows}


def memory_row(
    figures: Mapping[str, Any],
    plain: Mapping[str, Any] | None,
    first: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The MiB of a row, its ratios to a forward pass, and how many times less than first-order it takes.

    Args:
        figures: those of `client_alone`.
        plain: the same for the client that only makes a forward pass; None: it was not measured.
        first: the same for plain first-order; None: it was not measured.
    """
    tensors, process = figures["tensor_peak_bytes"], figures["process_peak_bytes"]
    row = {
        "tensor_peak_mib": round(tensors / _MIB, 1),
        "process_peak_mib": round(process / _MIB, 1),
        "held_mib": round(figures["held_bytes"] / _MIB, 1),
        "tensors_over_forward": round(tensors / figures["forward_peak_bytes"], 3),
    }
    if plain is not None:
        row["process_over_forward"] = round(process / plain["process_peak_bytes"], 3)
    if first is not None:
        row["tensors_less_than_first_order"] = round(first["tensor_peak_bytes"] / tensors, 2)
        row["process_less_than_first_order"] = round(first["process_peak_bytes"] / process, 2)
    return row
