"""The cost of one step on either side: memory, arithmetic, bytes. The parties' own code runs without data.

Costs are exact at their cut; `along_cuts` derives those of many cuts from two. The bytes on the wire are those of the
tensors counted here, packed as `hosl.wire` packs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any, TypeAlias

import msgspec
import numpy as np
import torch

from hosl.config import ClientsConfig, Config
from hosl.core.methods import FROZEN, METHODS
from hosl.core.targets import Batch, ClassTargets, OptionTargets, PositionTargets, Targets, scored_positions
from hosl.errors import ConfigError
from hosl.methods.step import method_round
from hosl.methods.synthetic import fixed_batch
from hosl.methods.torch_parties import (
    DTYPES,
    client_on,
    held_tensors,
    make_head,
    prepare_client_half_,
    prepare_server_half_,
    server_on,
)
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.micro_batches import TOKENS_AT_ONCE
from hosl.parties.servers.trunk import TrunkServer
from hosl.planner.dry_run import Work, as_if_computed, empty_, storage_bytes, without_data, work_of
from hosl.planner.fakes import CountingServer, InOnePart, Traffic, Unformed, without_updates
from hosl.planner.model_shape import ModelShape
from hosl.split import ClientHalf, HeadHalf
from hosl.split.quantised import Int8Linear
from hosl.tasks import SftConfig


@dataclass
class PartyCost:
    """The cost of one party's step."""

    static_bytes: float
    """Weights, buffers and optimiser state, held between steps."""
    peak_bytes: float
    """Static bytes, and all that is alive at the worst moment of a step."""
    loading_bytes: float
    """Resident while the half is loaded: its file, mapped in the checkpoint's dtype, and a copy if it is converted."""
    trained: float
    """The number of trained numbers."""
    state_bytes: float = 0.0
    """Optimiser state, of the static bytes."""
    work: Work = field(default_factory=Work)
    formed: float = 0.0
    """Elements of shifted weights that probes form."""
    updated: float = 0.0
    """Elements that an update along random directions moves, times the directions."""


CostCache: TypeAlias = dict[tuple[Config, int, int], PartyCost]
"""(config, rows, tokens) -> the cost of its step; for one model shape."""


def client_cost_at(config: Config, shape: ModelShape, rows: int, tokens: int) -> tuple[PartyCost, Traffic]:
    """The cost of a step of the config's method for the client, at the config's cut, and its traffic.

    Args:
        config: method, cut, dtypes, trainable sets, directions.
        shape: the shape of the whole model.
        rows: rows of the batch; a candidate answer is a row.
        tokens: tokens per row of the longest batch. One row has padding, as batches of text do.

    Raises:
        ConfigError, SplitError: if the config does not fit the model.
    """
    config = _on_cpu(config)
    return _in_micro_batches(
        config, rows, tokens, lambda count: _run_with_any_directions(config, shape, count, tokens)
    )


def _in_micro_batches(
    config: Config, rows: int, tokens: int, run: Callable[[int], tuple[PartyCost, Traffic]]
) -> tuple[PartyCost, Traffic]:
    """The result of `run(rows)`; of many micro-batches, which are alike, extrapolated from two and three of them."""
    if config.wire.labels == "client":  # its head takes the whole batch
        return run(rows)
    together = config.client.micro_batch_size or max(TOKENS_AT_ONCE // tokens, 1)
    by_threshold = (
        config.method_row.keeps_by_blocks and config.residual.kept == "auto"
    )  # of the whole batch's size
    if config.method_row.backward == "graph" or by_threshold or rows <= 4 * together:
        return run(rows)
    two, three = run(2 * together), run(3 * together)
    return _extrapolated(two, three, (rows - 2 * together) / together)


def client_memory(
    config: Config, shape: ModelShape, costs: CostCache | None = None
) -> Callable[[int, int], tuple[float, float, float]]:
    """The memory of `client_cost_at` alone: a function of rows and tokens; it returns static, peak and loading bytes.

    `costs` keeps the results of one cut for others; of one shape.
    """
    costs = {} if costs is None else costs

    def at(rows: int, tokens: int) -> tuple[float, float, float]:
        if config.method_row.memory_by_cut:
            cost = _memory_cost(config, shape, rows, tokens, costs)
            return cost.static_bytes, cost.peak_bytes, cost.loading_bytes
        static, loading = weight_bytes(config, shape)
        return static, static + beyond_weights(config, shape, costs)(rows, tokens), loading

    return at


def beyond_weights(
    config: Config, shape: ModelShape, costs: CostCache | None = None
) -> Callable[[int, int], float]:
    """The peak memory of a forward-only client beyond its weights: a function of rows and tokens; it returns bytes.

    This memory is the same at every cut with as many trained blocks, so the lowest one is run; and the same with one
    direction as with many.
    """
    assert not config.method_row.memory_by_cut, f"{config.method} keeps something of every block"
    if not trains_all_blocks(config.method, config.residual.blocks):
        config = with_cut(config, min(config.model.cut, lowest_with_block(config)))
    costs = {} if costs is None else costs

    def at(rows: int, tokens: int) -> float:
        cost = _memory_cost(config, shape, rows, tokens, costs)
        return cost.peak_bytes - cost.static_bytes

    return at


def _memory_cost(config: Config, shape: ModelShape, rows: int, tokens: int, costs: CostCache) -> PartyCost:
    config = _on_cpu(config)
    # low-rank probes are evaluated together, and a + probe may be kept for the server's step: there, directions count
    if config.zo.distribution != "low-rank" and config.zo.server_gradient_at == "clean":
        config = _with_directions(config, 1)
    key = (config, rows, tokens)
    if key not in costs:
        costs[key], _ = _in_micro_batches(
            config, rows, tokens, lambda count: _run(config, shape, count, tokens)
        )
    return costs[key]


def weight_bytes(config: Config, shape: ModelShape) -> tuple[float, float]:
    """The bytes of a client's weights at the config's cut: between steps, and while they are loaded."""
    half, head, checkpoint_bytes = _client_half(config, shape)
    held = [half.model] if head is None else [half.model, head.model]
    static = float(storage_bytes(t for model in held for t in (*model.parameters(), *model.buffers())))
    return static, _loading_bytes(config, checkpoint_bytes, static)


def _client_half(config: Config, shape: ModelShape) -> tuple[ClientHalf, HeadHalf | None, float]:
    """The client's half on the meta device, prepared for training; its head, if any; bytes in the checkpoint."""
    small, head = shape.of_blocks(max(config.model.cut, 1)), None
    if config.wire.labels == "client":
        half, _, head = small.three_pieces(config.model.cut)
    else:
        half, _ = small.halves(config.model.cut)
    parameters = [*half.parameters(), *(() if head is None else head.parameters())]
    checkpoint_bytes = float(storage_bytes(parameters))
    for piece in (half, head):
        if piece is not None:
            piece.convert(DTYPES[config.model.dtype])
    as_if_computed(lambda: prepare_client_half_(config, half))
    return half, head, checkpoint_bytes


def _run_with_any_directions(
    config: Config, shape: ModelShape, rows: int, tokens: int
) -> tuple[PartyCost, Traffic]:
    """The result of `_run`, extrapolated from few directions: all are alike, unless low-rank ones go together."""
    q, method = config.zo.directions, config.method_row
    if q == 1 or config.zo.distribution == "low-rank" or "client" not in method.draws:
        return _run(config, shape, rows, tokens)
    if method.needs_blocks or not method.clean_uploads or config.zo.server_gradient_at != "clean":
        # if a + probe is kept for the server's step, the second pair is the first one computed beside it
        first = 1 if config.zo.server_gradient_at == "clean" else 2
        few = [_run(_with_directions(config, count), shape, rows, tokens) for count in (first, first + 1)]
        return _extrapolated(few[0], few[1], q - first)
    # beside its probes such a step makes one clean pass; a pair is released before the next, so peaks are those of one
    one = _run(_with_directions(config, 1), shape, rows, tokens)
    clean, upload = _run(clean_pass(config), shape, rows, tokens)
    none = replace(one[0], work=clean.work, formed=0.0, updated=0.0)
    return _extrapolated((none, upload if method.uploads_per_direction else one[1]), one, q)


def with_cut(config: Config, cut: int) -> Config:
    """The config with `cut` blocks on the client."""
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, cut=cut))


def lowest_cut(method: str, trained_blocks: int | str | None, trainable: str) -> int:
    """The lowest cut at which a client has the blocks that it trains; without a number it takes them as they are."""
    if METHODS[method].needs_blocks or trainable == "output-projections":
        return trained_blocks if isinstance(trained_blocks, int) else 1
    return 1 if trainable == "last-block" else 0


def lowest_with_block(config: Config) -> int:
    """The lowest cut at which a client has the blocks that it trains, and at least one block."""
    return max(lowest_cut(config.method, config.residual.blocks, config.client.trainable), 1)


def trains_all_blocks(method: str, trained_blocks: int | str | None) -> bool:
    """Whether a method of last blocks trains all that the client has: then each is evaluated for those below it."""
    return METHODS[method].needs_blocks and trained_blocks == "all"


def clean_pass(config: Config) -> Config:
    """The config of the same client that only makes a forward pass."""
    plain = msgspec.structs.replace(
        config.zo, server_gradient_at="clean", sides="two", derivative="difference", row_clip=None
    )
    alone = ClientsConfig()  # a frozen client has no journal to share
    return msgspec.structs.replace(config, method=FROZEN, profile="paper", zo=plain, clients=alone)


def _extrapolated(
    first: tuple[PartyCost, Traffic], second: tuple[PartyCost, Traffic], t: float | int
) -> tuple[PartyCost, Traffic]:
    """The point first + t (second - first), number by number."""
    pairs = zip(astuple(first[1]), astuple(second[1]), strict=True)
    return _between(first[0], second[0], t), Traffic(*(round(a + t * (b - a)) for a, b in pairs))


def _with_directions(config: Config, directions: int) -> Config:
    zo = msgspec.structs.replace(config.zo, directions=directions, normalise="none")
    return msgspec.structs.replace(config, zo=zo)


def _run(config: Config, shape: ModelShape, rows: int, tokens: int) -> tuple[PartyCost, Traffic]:
    """The cost of a client's step and its traffic, from a step without data.

    Raises:
        ConfigError: if its memory follows from the data.
    """
    if config.zo.derivative == "forward-mode" and shape.has_experts:
        raise ConfigError(
            f"{shape.name}: no plan of zo.derivative: forward-mode with experts: it takes them one by one, with as "
            "many tokens as the data send them; plan zo.derivative: difference"
        )
    half, head, checkpoint_bytes = _client_half(config, shape)
    counting = CountingServer()
    with without_data():
        empty_(half.model, *(() if head is None else (head.model,)))
        server: Any = counting if head is None else make_head(config, head, half, counting)
        if config.method_row.backward == "none":
            for module in half.model.modules():
                if isinstance(module, Int8Linear):
                    module.__class__ = InOnePart
        client = client_on(config, half)
        formed: list[int] = []
        if isinstance(client, ZerothOrderClient):
            client.new_scratch = lambda: Unformed(formed)
        batch = fixed_batch(client, rows, tokens, scored=_scored_tokens(config, shape, tokens))
        if shape.head == "classification":
            batch = Batch(batch.input_ids, ClassTargets(batch.targets.mask, np.zeros(rows, np.int64)))
        party, step = without_updates(client), 1
        if _has_state(client) or _has_state(server):
            method_round(config, party, server, batch, step)
            step += 1
        alive = _alive(client) if head is None else [*_alive(client), *held_tensors(head, server)]
        counting.forget()
        formed.clear()
        work = work_of(lambda: method_round(config, party, server, batch, step), alive)
        static = float(storage_bytes(alive))
        trained = float(sum(p.numel() for p in half.parameters() if p.requires_grad))
        state = float(storage_bytes([*_state(client), *(() if head is None else _state(server))]))
    by_seeds = isinstance(client, ZerothOrderClient)
    cost = PartyCost(
        static_bytes=static, peak_bytes=static + work.peak_bytes,
        loading_bytes=_loading_bytes(config, checkpoint_bytes, static), trained=trained, state_bytes=state, work=work,
        formed=float(sum(formed)), updated=trained * config.zo.directions if by_seeds else 0.0,
    )  # fmt: skip
    return cost, counting.traffic(config, shape, rows, tokens)


def server_half(config: Config, shape: ModelShape) -> Any:
    """The server's half, or its trunk, on the meta device, prepared for training."""
    pieces = shape.three_pieces if config.wire.labels == "client" else shape.halves
    half = pieces(config.model.cut)[1]
    half.convert(DTYPES[config.model.dtype])
    as_if_computed(lambda: prepare_server_half_(config, half, []))
    return half


def server_cost(
    config: Config, shape: ModelShape, rows: int, tokens: int, *, gradients_stay: bool = True
) -> PartyCost:
    """The cost of a server's step: the losses of a step's probes, then its update, or its own probes.

    Without `gradients_stay`, each gradient of a weight is let go of as soon as it is there: the peak is then that of
    activations and one gradient, and nothing is updated.
    """
    labels_stay = config.wire.labels == "client"
    half: Any = server_half(config, shape)
    on_cpu = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, device="cpu"))
    with without_data():
        empty_(half.model)
        server: Any = server_on(on_cpu, half)
        targets = _targets(config, shape, rows, tokens)
        if labels_stay:
            server = _WithoutHead(server, _asked(targets))
        dtype = DTYPES[config.model.dtype]
        h = torch.empty(rows, tokens, shape.width, dtype=dtype)
        if _has_state(server):
            server.step(h, targets, step=1)
        for p in () if gradients_stay else half.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(_let_go_)
        alive = [*_alive(server), h]
        work = work_of(lambda: _serve(config, server, h, targets), alive)
        if config.method_row.server == "first-order" and config.method_row.uploads_per_direction:
            pair = work_of(lambda: server.losses([h, h], targets), alive)
            peak_bytes = max(work.peak_bytes, pair.peak_bytes)  # they run one after the other
            work = _combined(work, pair, lambda a, b: a + config.zo.directions * b)
            work = replace(work, peak_bytes=peak_bytes)
        static = float(storage_bytes(_alive(server)))
        trained = float(sum(p.numel() for p in half.parameters() if p.requires_grad))
        state = float(storage_bytes(_state(server)))
    pairs = "client" in config.method_row.draws and config.method_row.uploads_per_direction
    arrived = storage_bytes([h]) * (2 if pairs else 1)  # a pair of activations arrives together
    return PartyCost(
        static_bytes=static, peak_bytes=static + arrived + work.peak_bytes, loading_bytes=static, trained=trained,
        state_bytes=state, work=work, formed=0.0, updated=0.0,
    )  # fmt: skip


def along_cuts(
    cost_at: Callable[[int], PartyCost], sampled: Sequence[int], wanted: Sequence[int]
) -> dict[int, PartyCost]:
    """The costs at many cuts from two: all blocks are alike, so every figure is linear in the number of blocks.

    The peak of plain backprop is the larger of two lines (saved activations, gradients); the result follows the one
    that is larger at the sampled cuts.

    Args:
        cost_at: the exact cost at a cut.
        sampled: the two cuts to evaluate, ascending.
        wanted: the cuts of the result.
    """
    low, high = sampled
    at_low, at_high = cost_at(low), cost_at(high)
    if (
        low == 0
    ):  # the worst moment is in a block, and without blocks there is none; beyond weights it is the same
        worst = at_high.peak_bytes - at_high.static_bytes
        at_low = replace(at_low, peak_bytes=at_low.static_bytes + worst)
    return {cut: _between(at_low, at_high, (cut - low) / (high - low)) for cut in wanted}


def _between(low: PartyCost, high: PartyCost, t: float | int) -> PartyCost:
    """The point low + t (high - low), number by number, and no number below 0."""

    def line(a: float | int, b: float | int) -> float:
        return max(float(a + t * (b - a)), 0.0)

    names = ("static_bytes", "peak_bytes", "loading_bytes", "trained", "state_bytes", "formed", "updated")
    numbers = {name: line(getattr(low, name), getattr(high, name)) for name in names}
    return PartyCost(**numbers, work=_combined(low.work, high.work, line))


def _combined(a: Work, b: Work, number: Callable[[float, float], float]) -> Work:
    """`number(a, b)` of every number of two works; operations that one of them lacks are 0 there."""

    def counts(of_a: dict[Any, float], of_b: dict[Any, float]) -> dict[Any, float]:
        return {key: number(of_a.get(key, 0.0), of_b.get(key, 0.0)) for key in of_a.keys() | of_b.keys()}

    return Work(
        round(number(a.peak_bytes, b.peak_bytes)), counts(a.products, b.products), counts(a.attention, b.attention),
        round(number(a.moved_bytes, b.moved_bytes)), round(number(a.calls, b.calls)),
    )  # fmt: skip


def _serve(config: Config, server: Any, h: torch.Tensor, targets: Targets) -> None:
    method = config.method_row
    if method.server == "zeroth-order":
        if method.wants_gradient:
            server.gradient(h, targets)
        server.probe((h, h), targets, 1, config.zo.epsilon)
        return
    server.step(h, targets, step=2, want_gradient=method.wants_gradient)


def _let_go_(p: torch.Tensor) -> None:
    p.grad = None


class _WithoutHead:
    """The calls of a server on a trunk, whose states get a gradient as if there were a head above it."""

    def __init__(self, trunk: TrunkServer, asked: PositionTargets) -> None:
        self._trunk, self._asked = trunk, asked
        self.half, self.optimiser = trunk.half, trunk.optimiser

    def step(self, h: torch.Tensor, targets: Targets, *, step: int, want_gradient: bool = False) -> None:
        states, update = self._trunk.states_for_step(h, self._asked)
        update(torch.empty_like(states), step, want_gradient)

    def losses(self, activations: Sequence[torch.Tensor], targets: Targets) -> None:
        self._trunk.states(activations, self._asked)


def _asked(targets: Targets) -> PositionTargets:
    """The positions of a trunk's states; every row of a plan's batch has the same."""
    if isinstance(targets, ClassTargets):
        return PositionTargets(targets.mask, np.zeros(1, np.int64))
    return PositionTargets(targets.mask, scored_positions(targets))


def _scored_tokens(config: Config, shape: ModelShape, tokens: int) -> int:
    """The scored tokens of a row of texts: as many as the data say, else all, the most that a head can be asked."""
    return shape.scored_tokens or (tokens - 1 if isinstance(config.task, SftConfig) else 0)


def _targets(config: Config, shape: ModelShape, rows: int, tokens: int) -> Targets:
    mask = np.ones((rows, tokens), np.int8)
    mask[0, 0] = 0
    if shape.head == "classification":
        return ClassTargets(mask, np.zeros(rows, np.int64))
    scored = _scored_tokens(config, shape, tokens)
    if scored:
        places = np.tile(np.arange(tokens - 1 - scored, tokens - 1, dtype=np.int32), (rows, 1))
        return OptionTargets(mask, places, np.full(places.shape, 5, np.int32), "tokens")
    return OptionTargets(mask, np.full((rows, 1), tokens - 3, np.int32), np.full((rows, 1), 5, np.int32))


def _on_cpu(config: Config) -> Config:
    """The config with its client on the CPU, wherever it will run."""
    return msgspec.structs.replace(config, client=msgspec.structs.replace(config.client, device="cpu"))


def _has_state(party: Any) -> bool:
    """Whether the party's optimiser makes its state in its first step."""
    optimiser = getattr(party, "optimiser", None)
    return optimiser is not None and (
        type(optimiser).__name__ != "SGD" or bool(optimiser.defaults.get("momentum"))
    )


def _alive(party: Any) -> list[torch.Tensor]:
    """The tensors that a party holds between its steps."""
    return [*party.half.model.parameters(), *party.half.model.buffers(), *_state(party)]


def _state(party: Any) -> list[torch.Tensor]:
    """The tensors of a party's optimiser."""
    states = getattr(getattr(party, "optimiser", None), "state", {}).values()
    return [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]


def _loading_bytes(config: Config, checkpoint_bytes: float, static_bytes: float) -> float:
    converted = config.client.dtype != "model" or config.model.dtype != "float32"
    return checkpoint_bytes + static_bytes if converted else checkpoint_bytes
