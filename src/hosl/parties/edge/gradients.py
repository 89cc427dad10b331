"""Gradients of one block over the micro-batches of a batch, by its graph of exact or of residual gradients."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hosl.core.targets import Batch
from hosl.errors import ConfigError
from hosl.parties.edge.half import EdgeHalf, Extras


@dataclass(slots=True)
class Kept:
    """What a forward pass leaves for the update that its gradient will bring."""

    slices: Sequence[slice]
    """The rows of each micro-batch."""
    extras: Sequence[Extras]
    """What the blocks were given beside the hidden state, for each micro-batch."""
    batch: Batch
    inputs: list[np.ndarray] = field(default_factory=list)
    """The kept inputs of blocks [rows, seq, width], ascending."""


def block_gradients(
    half: EdgeHalf,
    index: int,
    variant: str,
    kept: Kept,
    hidden: np.ndarray,
    at_output: np.ndarray,
    *,
    wanted: Collection[str],
    to_input: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The gradients of one block's parameters over all rows, float32, and that at its input if `to_input`.

    Args:
        half: the half.
        index: the block.
        variant: `gradient` or `feedback`.
        kept: the micro-batches.
        hidden: the block's input; where there are several micro-batches, its gradient takes its place.
        at_output: the gradient at the block's output; is left as it is.
        wanted: the parameters by their names in the half.
        to_input: whether the gradient at the block's input is wanted.
    """
    weights = half.block_weights(index, variant)
    sums = half.sums(index, variant, wanted)
    found_sums, variant = dict(sums), f"{variant}-sums" if sums else variant
    at_input: np.ndarray | None = None
    for rows, extras in zip(kept.slices, kept.extras, strict=True):
        below, found = half.differentiated(
            index, variant, hidden[rows], extras, weights, at_output[rows],
            wanted=wanted, to_input=to_input, sums=sums,
        )  # fmt: skip
        _add_(found_sums, found)
        if below is not None and len(kept.slices) == 1:
            at_input = below
        elif below is not None:
            at_input = hidden
            at_input[rows] = below
    half.release(index)
    return found_sums, at_input


def trained_by_block(half: EdgeHalf, trained: Mapping[str, np.ndarray], variant: str) -> list[list[str]]:
    """The trained parameters of each block, for which its graph `variant` has gradients.

    Raises:
        ConfigError: if a trained parameter has no gradient, or the half was split without the graph.
    """
    found: list[list[str]] = []
    for index in range(half.cut):
        prefix = f"{half.facts.blocks[index].prefix}."
        inside = [name for name in trained if name.startswith(prefix)]
        graph = half.graph_facts(index, variant).gradients if inside else ()
        known = {half.parameter(index, name) for name in graph}
        found.append([name for name in inside if name in known])
    missing = trained.keys() - {name for names in found for name in names}
    if missing:
        raise ConfigError(
            f"the onnx runtime has no gradient of {min(missing)}: by gradients it trains blocks, last-block, "
            "output-projections and lora; set client.trainable to one of them, or take the torch runtime"
        )
    return found


def _add_(sums: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    """Add gradients to their sums, in place; `found` is emptied."""
    while found:
        name, gradient = found.popitem()
        if name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient
