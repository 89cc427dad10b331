"""What one step takes on either side: memory, arithmetic, bytes. The parties' own code, run without data.

Everything here is exact for the cut that is asked for; `along_cuts` gets many cuts out of a few. Bytes of a run's
wire: the tensors counted here, times what `hosl.wire` makes of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch

from hosl.config import Config
from hosl.core.targets import ClassTargets, OptionTargets, Targets
from hosl.methods.step import method_round
from hosl.methods.synthetic import fixed_batch
from hosl.methods.torch_parties import DTYPES, client_on, make_server, prepare_client_half_
from hosl.parties.clients.frozen import TOKENS_AT_ONCE
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.planner.dry_run import Work, as_if_computed, empty_, storage_bytes, without_data, work_of
from hosl.planner.fakes import CountingServer, InOnePart, Still, Traffic, Unformed
from hosl.planner.model_shape import ModelShape
from hosl.split import ClientHalf
from hosl.split.quantised import Int8Linear

BACKWARD = ("fo-fo", "fo-zo", "fo-recompute")
"""Methods whose client goes backward, and may hold an optimiser's state between steps."""


@dataclass
class PartyCost:
    """One party's step."""

    static_bytes: float
    """Weights, buffers and optimiser state, held between steps."""
    peak_bytes: float
    """Static and everything that is alive at the worst moment of a step."""
    loading_bytes: float
    """Resident while the half is loaded: its file is mapped in the checkpoint's dtype, and what is converted copied."""
    trained: float
    """How many numbers are trained."""
    work: Work = field(default_factory=Work)
    formed: float = 0.0
    """Elements of shifted weights that probes form."""
    updated: float = 0.0
    """Elements that an update along random directions moves, times the directions."""


@dataclass(frozen=True)
class StepCost:
    """Both parties' step and what crosses between them."""

    client: PartyCost
    server: PartyCost
    traffic: Traffic


def step_cost(config: Config, shape: ModelShape, rows: int, tokens: int) -> StepCost:
    """A step of the config's method at the config's cut.

    Args:
        config: method, cut, dtypes, trainable sets, directions.
        shape: of the whole model.
        rows: of the batch; a candidate answer is a row.
        tokens: per row, of the longest batch. One row has padding, as batches of text do.

    Raises:
        ConfigError, SplitError: if the config does not fit the model.
    """
    client, traffic = client_cost_at(config, shape, rows, tokens)
    return StepCost(client, server_cost(config, shape, rows, tokens), traffic)


def client_cost_at(config: Config, shape: ModelShape, rows: int, tokens: int) -> tuple[PartyCost, Traffic]:
    """A client's step at the config's cut, and what crosses in it; see `step_cost`."""
    config = _without_guidance(config)
    return _in_micro_batches(
        config, rows, tokens, lambda count: _with_any_directions(config, shape, count, tokens)
    )


def _in_micro_batches(
    config: Config, rows: int, tokens: int, run: Callable[[int], tuple[PartyCost, Traffic]]
) -> tuple[PartyCost, Traffic]:
    """`run` of so many rows; where these make many micro-batches, which are all alike, from two of them and three."""
    together = config.client.micro_batch_size or max(TOKENS_AT_ONCE // tokens, 1)
    if config.method in ("fo-fo", "fo-zo") or rows <= 4 * together:
        return run(rows)
    two, three = run(2 * together), run(3 * together)
    return _line(two, three, (rows - 2 * together) / together)


def client_memory(
    config: Config, shape: ModelShape, known: dict[Any, PartyCost] | None = None
) -> Callable[[int, int], tuple[float, float, float]]:
    """As `client_cost_at`, for those who ask for memory only: static, peak and loading bytes, of rows and tokens.

    `known` keeps what was run for one cut and serves at others; of one shape.
    """

    def at(rows: int, tokens: int) -> tuple[float, float, float]:
        if config.method in BACKWARD:
            cost = _known_memory(config, shape, rows, tokens, {} if known is None else known)
            return cost.static_bytes, cost.peak_bytes, cost.loading_bytes
        static, loading = weight_bytes(config, shape)
        return static, static + beyond_weights(config, shape, known)(rows, tokens), loading

    return at


def beyond_weights(
    config: Config, shape: ModelShape, known: dict[Any, PartyCost] | None = None
) -> Callable[[int, int], float]:
    """What a client that goes forward only holds at most, beyond its weights: bytes, of rows and tokens.

    That is the same at every cut, so the lowest is enough to find it; and with one direction as with many.
    """
    assert config.method not in BACKWARD, f"{config.method} keeps something of every block"
    config = with_cut(config, min(config.model.cut, lowest_with_block(config)))

    def at(rows: int, tokens: int) -> float:
        cost = _known_memory(config, shape, rows, tokens, {} if known is None else known)
        return cost.peak_bytes - cost.static_bytes

    return at


def _known_memory(
    config: Config, shape: ModelShape, rows: int, tokens: int, known: dict[Any, PartyCost]
) -> PartyCost:
    config = _without_guidance(config)
    # but low-rank probes are evaluated together, and + probes may be kept for the server's step
    if config.zo.distribution != "low-rank" and config.zo.server_gradient_at == "clean":
        config = _with_directions(config, 1)
    key = (msgspec.json.encode(config), rows, tokens)
    if key not in known:
        known[key], _ = _in_micro_batches(
            config, rows, tokens, lambda count: _run(config, shape, count, tokens)
        )
    return known[key]


def weight_bytes(config: Config, shape: ModelShape) -> tuple[float, float]:
    """Bytes of a client's weights at the config's cut: between steps, and while they are loaded."""
    half, _ = shape.of_blocks(max(config.model.cut, 1)).halves(config.model.cut)
    checkpoint_bytes = float(storage_bytes(half.parameters()))
    half.convert(DTYPES[config.model.dtype])
    as_if_computed(lambda: prepare_client_half_(config, half))
    static = float(storage_bytes([*half.parameters(), *half.model.buffers()]))
    return static, _loading_bytes(config, checkpoint_bytes, static)


def _with_any_directions(
    config: Config, shape: ModelShape, rows: int, tokens: int
) -> tuple[PartyCost, Traffic]:
    """Directions are all alike, too, unless low-rank ones are evaluated together."""
    q = config.zo.directions
    if (
        q == 1
        or config.zo.distribution == "low-rank"
        or config.method in (*BACKWARD, "frozen", "hosl-guided")
    ):
        return _run(config, shape, rows, tokens)
    if config.method in ("hosl-node", "zo-zo") or config.zo.server_gradient_at != "clean":
        # where a + probe is kept for the server's step, the second pair is the first that is computed beside it
        first = 1 if config.zo.server_gradient_at == "clean" else 2
        few = [_run(_with_directions(config, count), shape, rows, tokens) for count in (first, first + 1)]
        return _line(few[0], few[1], q - first)
    # beside its probes such a step makes one clean pass; a pair is let go before the next, so one holds what many hold
    one = _run(_with_directions(config, 1), shape, rows, tokens)
    clean, upload = _run(clean_pass(config), shape, rows, tokens)
    without = replace(one[0], work=clean.work, formed=0.0, updated=0.0)
    return _line((without, upload if config.method == "hosl" else one[1]), one, q)


def with_cut(config: Config, cut: int) -> Config:
    """The same with so many blocks on the client."""
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, cut=cut))


def lowest_cut(method: str, guided_blocks: int, trainable: str) -> int:
    """The lowest cut at which a client has the blocks that it trains."""
    if method in ("hosl-guided", "hosl-node"):
        return guided_blocks
    return 1 if trainable == "last-block" else 0


def lowest_with_block(config: Config) -> int:
    """The same, for a client of one block at least."""
    return max(lowest_cut(config.method, config.zo.guided_blocks, config.client.trainable), 1)


def clean_pass(config: Config) -> Config:
    """A forward pass of the same client, by itself."""
    plain = msgspec.structs.replace(
        config.zo,
        server_gradient_at="clean",
        sides="two",
        derivative="difference",
        row_clip=None,
        guidance="none",
    )
    return msgspec.structs.replace(config, method="frozen", profile="paper", zo=plain)


def _run(config: Config, shape: ModelShape, rows: int, tokens: int) -> tuple[PartyCost, Traffic]:
    half, _ = shape.of_blocks(max(config.model.cut, 1)).halves(config.model.cut)
    server = CountingServer()
    cost = _client_cost(config, half, server, rows, tokens)
    return cost, server.traffic(config, shape, rows, tokens)


def _line(
    first: tuple[PartyCost, Traffic], second: tuple[PartyCost, Traffic], t: float | int
) -> tuple[PartyCost, Traffic]:
    a, b = first[1], second[1]
    traffic = Traffic(
        round(a.bytes_up + t * (b.bytes_up - a.bytes_up)),
        round(a.bytes_down + t * (b.bytes_down - a.bytes_down)),
        round(a.round_trips + t * (b.round_trips - a.round_trips)),
    )
    return _between(first[0], second[0], t), traffic


def _with_directions(config: Config, directions: int) -> Config:
    zo = msgspec.structs.replace(config.zo, directions=directions, normalise="none")
    return msgspec.structs.replace(config, zo=zo)


def _client_cost(
    config: Config, half: ClientHalf, server: "CountingServer", rows: int, tokens: int
) -> PartyCost:
    checkpoint_bytes = float(storage_bytes(half.parameters()))
    half.convert(DTYPES[config.model.dtype])
    as_if_computed(lambda: prepare_client_half_(config, half))
    with without_data():
        empty_(half.model)
        if config.method not in BACKWARD:
            for module in half.model.modules():
                if isinstance(module, Int8Linear):
                    module.__class__ = InOnePart
        client = client_on(config, half)
        scratch = Unformed()
        if isinstance(client, ZerothOrderClient):
            client.new_scratch = lambda: scratch.emptied()
        batch = fixed_batch(client, rows, tokens)
        party, step = Still(client), 1
        if _has_state(client):
            method_round(config, party, server, batch, step)
            step += 1
        alive = _alive(client)
        server.forget()
        work = work_of(lambda: method_round(config, party, server, batch, step), alive)
        static = float(storage_bytes(alive))
        trained = float(sum(p.numel() for p in half.parameters() if p.requires_grad))
    by_seeds = isinstance(client, ZerothOrderClient)
    return PartyCost(
        static_bytes=static, peak_bytes=static + work.peak_bytes,
        loading_bytes=_loading_bytes(config, checkpoint_bytes, static), trained=trained, work=work,
        formed=scratch.elements, updated=trained * config.zo.directions if by_seeds else 0.0,
    )  # fmt: skip


def server_cost(config: Config, shape: ModelShape, rows: int, tokens: int) -> PartyCost:
    """A server's step: the losses of a step's probes, then its update, or its own probes."""
    _, half = shape.halves(config.model.cut)
    half.convert(DTYPES[config.model.dtype])
    on_cpu = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, device="cpu"))
    with without_data():
        empty_(half.model)
        server: Any = make_server(on_cpu, half, [])
        targets = _targets(shape, rows, tokens)
        dtype = DTYPES[config.model.dtype]
        h = torch.empty(rows, tokens, shape.width, dtype=dtype)
        if _has_state(server):
            server.step(h, targets, step=1)
        alive = [*_alive(server), h]
        work = work_of(lambda: _serve(config, server, h, targets), alive)
        if config.method == "hosl":
            pair = work_of(lambda: server.losses([h, h], targets), alive)
            work = _together(work, pair, config.zo.directions)
        static = float(storage_bytes(_alive(server)))
        trained = float(sum(p.numel() for p in half.parameters() if p.requires_grad))
    # a pair of activations arrives together
    arrived = storage_bytes([h]) * (2 if config.method in ("hosl", "zo-zo") else 1)
    return PartyCost(
        static_bytes=static, peak_bytes=static + arrived + work.peak_bytes, loading_bytes=static, trained=trained,
        work=work, formed=0.0, updated=0.0,
    )  # fmt: skip


def along_cuts(
    cost_at: Callable[[int], PartyCost], sampled: Sequence[int], wanted: Sequence[int]
) -> dict[int, PartyCost]:
    """Costs at many cuts from two: every figure is a line in the number of blocks, as all blocks are alike.

    Peaks of plain backprop are the larger of two lines (the saved activations, the gradients) and follow the one that
    is larger at the sampled cuts.
    """
    low, high = sampled
    at_low, at_high = cost_at(low), cost_at(high)
    if (
        low == 0
    ):  # without blocks there is no block's moment to be the worst: beyond weights it is the same at all cuts
        worst = at_high.peak_bytes - at_high.static_bytes
        at_low = replace(at_low, peak_bytes=at_low.static_bytes + worst)
    return {cut: _between(at_low, at_high, (cut - low) / (high - low)) for cut in wanted}


def _between(low: PartyCost, high: PartyCost, t: float | int) -> PartyCost:
    def line(a: float | int, b: float | int) -> float:
        return max(float(a + t * (b - a)), 0.0)

    def counts(a: dict[Any, float], b: dict[Any, float]) -> dict[Any, float]:
        return {key: line(a.get(key, 0.0), b.get(key, 0.0)) for key in a.keys() | b.keys()}

    work = Work(
        peak_bytes=round(line(low.work.peak_bytes, high.work.peak_bytes)),
        products=counts(low.work.products, high.work.products),
        attention=counts(low.work.attention, high.work.attention),
        moved_bytes=round(line(low.work.moved_bytes, high.work.moved_bytes)),
        calls=round(line(low.work.calls, high.work.calls)),
    )
    names = ("static_bytes", "peak_bytes", "loading_bytes", "trained", "formed", "updated")
    return PartyCost(**{name: line(getattr(low, name), getattr(high, name)) for name in names}, work=work)


def _together(work: Work, other: Work, times: int) -> Work:
    """`work`, and `other` so many times, one after the other."""

    def counts(a: dict[Any, float], b: dict[Any, float]) -> dict[Any, float]:
        return {key: a.get(key, 0.0) + times * b.get(key, 0.0) for key in a.keys() | b.keys()}

    return Work(
        max(work.peak_bytes, other.peak_bytes), counts(work.products, other.products),
        counts(work.attention, other.attention), work.moved_bytes + times * other.moved_bytes,
        work.calls + times * other.calls,
    )  # fmt: skip


def _serve(config: Config, server: Any, h: torch.Tensor, targets: Targets) -> None:
    if config.method in ("zo-zo", "fo-zo"):
        if config.method == "fo-zo":
            server.gradient(h, targets)
        server.probe((h, h), targets, 1, config.zo.epsilon)
        return
    wants = config.method not in ("hosl", "frozen")
    server.step(h, targets, step=2, want_gradient=wants)


def _targets(shape: ModelShape, rows: int, tokens: int) -> Targets:
    mask = np.ones((rows, tokens), np.int8)
    mask[0, 0] = 0
    if shape.head == "classification":
        return ClassTargets(mask, np.zeros(rows, np.int64))
    return OptionTargets(mask, np.full((rows, 1), tokens - 3, np.int32), np.full((rows, 1), 5, np.int32))


def _without_guidance(config: Config) -> Config:
    """Directions along activations are chosen by reading them, which nothing without data can; taken as random ones."""
    zo = msgspec.structs.replace(config.zo, guidance="none")
    client = msgspec.structs.replace(config.client, device="cpu")
    return msgspec.structs.replace(config, zo=zo, client=client)


def _has_state(party: Any) -> bool:
    """Whether the party's optimiser makes its state in its first step."""
    optimiser = getattr(party, "optimiser", None)
    return optimiser is not None and (
        type(optimiser).__name__ != "SGD" or bool(optimiser.defaults.get("momentum"))
    )


def _alive(party: Any) -> list[torch.Tensor]:
    """What a party holds between its steps."""
    tensors = [*party.half.model.parameters(), *party.half.model.buffers()]
    for state in getattr(getattr(party, "optimiser", None), "state", {}).values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors


def _loading_bytes(config: Config, checkpoint_bytes: float, static_bytes: float) -> float:
    converted = config.client.dtype != "model" or config.model.dtype != "float32"
    return checkpoint_bytes + static_bytes if converted else checkpoint_bytes
