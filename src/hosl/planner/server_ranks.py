"""The cost of a server half over several ranks: memory of each, gathers and bytes of a step, and the layout to take.

Memory comes from the server's own step on tensors without data, over the rows of one rank; what is shared out, gathered
and added up is counted from the shapes of its weights, as FSDP2 does it (`hosl.ranks.sharding`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hosl.config import Config
from hosl.core.layout import Layout
from hosl.errors import ConfigError
from hosl.methods.torch_parties import DTYPES
from hosl.planner.costs import PartyCost, server_cost, server_half
from hosl.planner.dry_run import storage_bytes
from hosl.planner.machine import Machine
from hosl.planner.model_shape import ModelShape
from hosl.system.readable import readable_bytes

TOLD_BYTES_PER_S = 1e9
"""The speed assumed of commands from rank 0, which carry activations through the host's memory by gloo."""
_BLOCKS_GATHERED = 2
"""The blocks that are whole at once where they are let go again: that in use, and the next one."""


@dataclass(frozen=True, kw_only=True)
class RankSpeed:
    """The speed of the ranks."""

    machine: Machine
    """Of one rank's arithmetic."""
    between_bytes_per_s: float
    """What a rank gets from the others in a second."""


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """The cost of a step for each rank of a layout; the rank with most."""

    layout: Layout
    rows: int
    """The rows of a request that a rank computes."""
    held_bytes: float
    """Weights, buffers and optimiser state between steps."""
    peak_bytes: float
    """Held bytes, and all that is alive at the worst moment of a step."""
    loading_bytes: float
    """Resident while the half is opened, beside its file's pages."""
    gathers: float
    """How often in a step the weights of a copy are put together on a rank."""
    exchanged_bytes: float
    """What a rank gets from the others in a step: weights, sums of gradients, and dL/dh of their rows."""
    told_bytes: float
    """Activations that rank 0 tells each of the others in a step."""
    compute_s: float
    exchange_s: float
    """Seconds of both exchanges, with nothing computed beside them."""

    def fits(self, limit_bytes: float | None) -> bool:
        """Whether a rank with so much memory can do it; None: no limit."""
        return limit_bytes is None or self.needed_bytes <= limit_bytes

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.exchange_s

    @property
    def needed_bytes(self) -> float:
        """The most that tensors take, while it is opened or at work."""
        return max(self.peak_bytes, self.loading_bytes)


def layouts(ranks: int) -> list[Layout]:
    """The layouts of so many ranks, from whole weights on each to one copy over all, each as it is and kept gathered.

    Raises:
        ConfigError: if these are less than two.
    """
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0] or [1]
    plain = [Layout(ranks=ranks, per_copy=size) for size in sizes]
    return [*plain, *(replace(layout, keep_gathered=True) for layout in plain if layout.per_copy > 1)]


def rank_costs(
    config: Config, shape: ModelShape, rows: int, tokens: int, *, ranks: int, speed: RankSpeed
) -> list[RankCost]:
    """The cost of every layout of so many ranks, for a step of the config's method at the config's cut.

    Args:
        config: method, cut, dtypes, what the server trains and how.
        shape: the shape of the whole model.
        rows: rows of a request.
        tokens: tokens per row.
        ranks: the number of ranks.
        speed: how fast they are.

    Raises:
        ConfigError: if there are less than two, or the method's server needs one process.
    """
    check_ranks(config, ranks)
    if config.method_row.server != "first-order":
        raise ConfigError(f"--ranks: the server of {config.method} is probed, which one process does")
    step = _Step(config, shape, rows, tokens, ranks)
    return [_cost(step, layout, speed) for layout in layouts(ranks)]


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse settings of which no method's server can have so many ranks.

    Raises:
        ConfigError: naming the setting.
    """
    layouts(ranks)
    if config.wire.labels == "client":
        raise ConfigError("--ranks: a server whose labels stay at the client has one process; leave it out")
    if config.clients.server == "personal":
        raise ConfigError(
            "--ranks: a server with adapters for each device (clients.server: personal) has one process; leave it out"
        )


def recommended_layout(costs: Sequence[RankCost], limit_bytes: float | None) -> tuple[RankCost | None, str]:
    """The fastest layout that fits into the memory of a rank, of those within 1 % of it the smallest; and the reason.

    None: none fits; the reason then says what would.
    """
    fitting = [cost for cost in costs if cost.fits(limit_bytes)]
    if not fitting:
        least = min(costs, key=lambda cost: cost.needed_bytes)
        return None, (
            f"nothing fits: the least is {options_of(least.layout)} with {readable_bytes(least.needed_bytes)} a rank; "
            "take a later cut, fewer rows, or, where all weights are trained, more ranks or server.trainable: lora"
        )
    fastest_s = min(cost.step_s for cost in fitting)
    best = min((c for c in fitting if c.step_s <= 1.01 * fastest_s), key=lambda cost: cost.needed_bytes)
    return best, "the fastest" if limit_bytes is None else "the fastest that fits"


def options_of(layout: Layout) -> str:
    """The options of `hosl serve` for a layout."""
    copies = "" if layout.per_copy == layout.ranks else f" --ranks-per-copy {layout.per_copy}"
    return f"--ranks {layout.ranks}{copies}{' --keep-gathered' if layout.keep_gathered else ''}"


def rank_facts(cost: RankCost, limit_bytes: float | None) -> dict[str, Any]:
    """A layout and its cost as plain data, units in the names."""
    layout = cost.layout
    return {
        "options": options_of(layout), "ranks": layout.ranks, "ranks_per_copy": layout.per_copy,
        "keep_gathered": layout.keep_gathered, "fits": cost.fits(limit_bytes), "rows": cost.rows,
        "held_bytes": round(cost.held_bytes), "tensor_peak_bytes": round(cost.peak_bytes),
        "loading_bytes": round(cost.loading_bytes), "gathers": cost.gathers,
        "exchanged_bytes": round(cost.exchanged_bytes), "told_bytes": round(cost.told_bytes),
        "compute_s": round(cost.compute_s, 4), "exchange_s": round(cost.exchange_s, 4),
    }  # fmt: skip


class _Step:
    """A step of the server: what one rank computes of it, and the weights that it takes part in."""

    def __init__(self, config: Config, shape: ModelShape, rows: int, tokens: int, ranks: int) -> None:
        method = config.method_row
        self.rows = -(-rows // ranks)
        self.alone = server_cost(config, shape, self.rows, tokens)
        """The step of one process over a rank's rows."""
        self.without_gradients = server_cost(config, shape, self.rows, tokens, gradients_stay=False)
        self.weights = _Weights(config, shape, self.alone)
        probes = "client" in method.draws and method.uploads_per_direction
        self.evaluated = 2 * config.zo.directions if probes else 0
        """The activations of probes that are evaluated before the step, each on its own."""
        if probes and config.zo.server_gradient_at == "first-plus":
            self.evaluated -= 1  # the step's own
        h_bytes = rows * tokens * shape.width * DTYPES[config.model.dtype].itemsize
        self.told_bytes = float(h_bytes * (self.evaluated + 1))
        # every rank is told all rows, and gets the gradient of all
        self.gradient_bytes = h_bytes * (ranks - 1) / ranks if method.wants_gradient else 0.0
        others = (rows - self.rows) / rows
        self.beside_bytes = h_bytes * (others * (2 if probes else 1) + (2 if method.wants_gradient else 0))


class _Weights:
    """The weights of a server half by the modules that are gathered together, and what is whole on every rank."""

    def __init__(self, config: Config, shape: ModelShape, cost: PartyCost) -> None:
        half = server_half(config, shape)
        adapters = config.server.trainable == "lora"
        self._shared: list[torch.Tensor] = []
        units = dict[str, int]()
        for name, p in half.model.named_parameters():
            if p.requires_grad or not adapters:  # frozen weights under adapters are whole everywhere
                self._shared.append(p)
                unit = _block_of(name, half.blocks_name)
                units[unit] = units.get(unit, 0) + storage_bytes([p])
        self.root_bytes = units.pop("", 0)
        """Of the weights outside the blocks, which are gathered for a whole forward pass."""
        self.root_trained_bytes = storage_bytes(
            p
            for name, p in half.model.named_parameters()
            if p.requires_grad and not _block_of(name, half.blocks_name)
        )
        self.summed_per_byte = max(1.0, 4 / DTYPES[config.model.dtype].itemsize)
        """The bytes of a gradient while it is added up, in float32 at least, over those of its weight."""
        self.block_bytes = max(units.values(), default=0)
        self.bytes = storage_bytes(self._shared)
        """Of all weights that are shared out."""
        self.trained_bytes = storage_bytes(p for p in self._shared if p.requires_grad)
        self.largest_bytes = max(map(_share(1), self._shared), default=0)
        self._whole_bytes = storage_bytes([*half.model.parameters(), *half.model.buffers()]) - self.bytes
        self._state_per_byte = cost.state_bytes / max(self.trained_bytes, 1)

    def held_bytes(self, per_copy: int) -> float:
        """The weights and buffers of the rank with the most rows of each tensor."""
        return float(self._whole_bytes + sum(map(_share(per_copy), self._shared)))

    def gradient_bytes(self, per_copy: int) -> float:
        """The gradients of that rank, once they are added up."""
        return float(sum(map(_share(per_copy), (p for p in self._shared if p.requires_grad))))

    def state_bytes(self, per_copy: int) -> float:
        """The optimiser state of that rank."""
        return self._state_per_byte * self.gradient_bytes(per_copy)

    @property
    def trained_share(self) -> float:
        """The share of the weights that is trained."""
        return self.trained_bytes / max(self.bytes, 1)


def _block_of(name: str, blocks: str) -> str:
    """The number of a weight's block; empty: it is outside the blocks."""
    index = name.removeprefix(f"{blocks}.").partition(".")[0]
    return index if name.startswith(f"{blocks}.") and index.isdigit() else ""


def _share(per_copy: int) -> Callable[[torch.Tensor], int]:
    """The bytes of the first rank's rows of a tensor, which has the most."""

    def of(p: torch.Tensor) -> int:
        rows = p.shape[0] if p.dim() else 1
        return -(-rows // per_copy) * (p.numel() // max(rows, 1)) * p.element_size()

    return of


def _cost(step: _Step, layout: Layout, speed: RankSpeed) -> RankCost:
    weights, size = step.weights, layout.per_copy
    held = weights.held_bytes(size)
    loading, gathers = held, 0.0
    if size > 1:
        gathers = 1.0 if layout.keep_gathered else step.evaluated + 2.0
        loading += weights.largest_bytes
    exchanged = _exchanged_bytes(weights, layout, gathers) + step.gradient_bytes
    static = held + weights.state_bytes(size)
    return RankCost(
        layout=layout, rows=step.rows, held_bytes=static,
        peak_bytes=static + step.beside_bytes + _at_work_bytes(step, layout), loading_bytes=loading, gathers=gathers,
        exchanged_bytes=exchanged, told_bytes=step.told_bytes, compute_s=_compute_s(step, size, speed.machine),
        exchange_s=exchanged / speed.between_bytes_per_s + step.told_bytes / TOLD_BYTES_PER_S,
    )  # fmt: skip


def _compute_s(step: _Step, per_copy: int, machine: Machine) -> float:
    """Seconds of arithmetic: a rank updates only the weights that it holds."""
    without_update = machine.seconds(step.without_gradients.work)
    update = machine.seconds(step.alone.work) - without_update
    return without_update + max(update, 0.0) / per_copy


def _at_work_bytes(step: _Step, layout: Layout) -> float:
    """The worst moment of a step beyond what is held: as the backward pass begins, or as it ends.

    In between, activations become less as evenly as gradients that were added up become more.
    """
    weights = step.weights
    if layout.per_copy == 1:  # gradients are added up one after the other, in float32
        copy = weights.largest_bytes * weights.summed_per_byte if weights.summed_per_byte > 1 else 0.0
        return step.alone.peak_bytes - step.alone.static_bytes + copy
    activations = step.without_gradients.peak_bytes - step.without_gradients.static_bytes
    in_use = weights.root_bytes + _BLOCKS_GATHERED * weights.block_bytes
    of_root = weights.root_trained_bytes  # waits for the end of the pass
    begin = activations + (weights.bytes if layout.keep_gathered else in_use) + of_root
    # as it is, and as it is sent
    of_block = (1 + weights.summed_per_byte) * weights.trained_share * weights.block_bytes
    return max(begin, weights.gradient_bytes(layout.per_copy) + in_use + of_root + of_block)


def _exchanged_bytes(weights: _Weights, layout: Layout, gathers: float) -> float:
    """What a rank gets: gathered weights, the sums of gradients in its copy, and those over the copies."""
    others_in_copy = (layout.per_copy - 1) / layout.per_copy
    other_copies = (layout.copies - 1) / layout.copies
    summed = weights.trained_bytes * weights.summed_per_byte
    in_copy = others_in_copy * (gathers * weights.bytes + summed)
    return in_copy + 2 * other_copies * summed / layout.per_copy
