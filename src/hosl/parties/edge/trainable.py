"""The weights that a client on the engine trains, by `client.trainable`; `hosl.split.adapters` is its twin."""

from typing import Literal, TypeAlias

from hosl.errors import SplitError
from hosl.parties.edge.half import EdgeHalf

Trainable: TypeAlias = Literal["all", "blocks", "last-block", "output-projections", "lora", "none"]


def trained_names(half: EdgeHalf, which: Trainable, *, blocks: int = 1) -> list[str]:
    """The parameters to train by their names in the half; `blocks` is the number of last ones for output projections.

    Raises:
        SplitError: if the output projections of the architecture are not known.
    """
    everywhere = range(half.cut)
    match which:
        case "none":
            return []
        case "lora":
            return list(half.adapters)
        case "output-projections":
            return [name for index in everywhere[-blocks:] for name in _output_projections(half, index)]
        case "last-block":
            return [name for index in everywhere[-1:] for name in half.parameters(index)]
        case "blocks":
            return [name for index in everywhere for name in half.parameters(index)]
        case "all":
            prelude = half.facts.prelude
            before = [*prelude.weights.values(), *([prelude.table] if prelude.table else [])]
            shared = tuple(f"{name}." for name in half.family.shared) if half.family else ()
            return [
                *(name for name in dict.fromkeys(before) if not name.startswith(shared)),
                *trained_names(half, "blocks"),
            ]


def _output_projections(half: EdgeHalf, index: int) -> list[str]:
    """The parameters of one block's output projections, and of the norms between them and its output."""
    family = half.family
    if family is None or not family.output_projections:
        raise SplitError(
            "this method moves the layers of a block that write to the residual stream, which hosl does not know of "
            f"the half in {half.folder}; choose one that moves all weights, such as hosl or hosl-gradient"
        )
    norms = tuple(name for names in half.norms_above.values() for name in names)
    prefix = half.facts.blocks[index].prefix
    layers = tuple(f"{prefix}.{layer}." for layer in (*family.output_projections, *norms))
    return [name for name in half.parameters(index) if name.startswith(layers)]
