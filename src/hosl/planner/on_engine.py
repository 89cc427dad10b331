"""The rows of a plan for a device with an inference engine (the onnx runtime): its ways, its shapes, the choice."""

from collections.abc import Callable, Sequence

import msgspec

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.methods.variants import FORWARD, ON_ENGINE, VARIANTS
from hosl.parties.edge.make import check_config
from hosl.planner.costs import lowest_cut
from hosl.planner.edge_memory import EdgeShape, StoredShape, edge_shape
from hosl.planner.model_shape import ModelShape
from hosl.planner.plan import PLANNED, PlanRow, Question, nothing_recommended
from hosl.split.adapters import default_targets

_CHOICE = {v.name: v.choice_on_engine for v in VARIANTS if v.choice_on_engine is not None}
"""By variant, its rank, 1 for the one that trains most."""


def names_on_engine(
    question: Question, asked: Sequence[str] | None, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The names of the variants that a plan compares on the engine; those that it has not are said in a line.

    `asked`: the names of those that are wanted; None: the usual ones.

    Raises:
        ConfigError: if it has none of them, as the settings are.
    """
    usual = [v for v in VARIANTS if v.name in PLANNED or v in ON_ENGINE]
    wanted = usual if asked is None else [v for v in VARIANTS if v.name in asked]
    names, refused = [], dict[str, str]()
    for variant in wanted:
        least = lowest_cut(variant.method, question.base.residual.blocks, variant.client.get("trainable", ""))
        try:
            check_config(variant.applied(question.base, cut=max(question.base.model.cut, least)))
        except ConfigError as reason:
            refused[variant.name] = str(reason)
        else:
            names.append(variant.name)
    if not names:
        raise ConfigError(next(iter(refused.values())))
    if refused:
        say(f"the onnx runtime has no {'; '.join(refused)}")
    return tuple(names)


def shape_on_engine(shape: ModelShape) -> EdgeShape:
    """All blocks of a model as a client on the engine holds them."""
    half, _ = shape.halves(shape.blocks)
    parameters = {name: StoredShape(tuple(p.shape), p.element_size()) for name, p in half.named_parameters()}
    prefixes = [f"{half.blocks_name}.{index}" for index in range(shape.blocks)]
    return edge_shape(
        parameters, prefixes, shape.config.to_dict(), shape.width, (shape.config.model_type, shape.head)
    )


def with_named_adapters(config: Config, shape: ModelShape) -> Config:
    """The config with the layers of its adapters by name, as `hosl split --lora-targets` fixes them in graphs."""
    if config.client.lora.target_modules is not None:
        return config
    half, _ = shape.of_blocks(1).halves(1)
    try:
        targets = tuple(default_targets(half))
    except ConfigError:  # adapters would be refused with this message, and perhaps none are wanted
        return config
    lora = msgspec.structs.replace(config.client.lora, target_modules=targets)
    return msgspec.structs.replace(config, client=msgspec.structs.replace(config.client, lora=lora))


def recommended_on_engine(rows: Sequence[PlanRow], *, cut: int) -> tuple[PlanRow, str]:
    """The row to take, and the reason: exact gradients of as much as fits, at `cut` or the nearest cut below.

    Raises:
        ConfigError: if none of these ways fits.
    """
    ranked = [row for row in rows if row.name in _CHOICE]
    fitting = [row for row in ranked if row.fits and row.cut <= cut]
    if not fitting or all(row.name == FORWARD.name for row in ranked):
        raise nothing_recommended(rows, cut)

    def rank(row: PlanRow) -> tuple[bool, int, int, bool]:
        together = row.config.client.micro_batch_size is None
        return row.name != FORWARD.name, row.cut, -_CHOICE[row.name], together

    best = max(fitting, key=rank)
    lower = "" if best.cut == cut else f"; at cut {cut} no such way fits"
    if best.name == FORWARD.name:
        return best, f"of the ways with exact gradients none fits{lower}"
    return best, f"of the ways with exact gradients that fit, {best.name} trains most{lower}"
