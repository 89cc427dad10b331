"""The table of `hosl plan`: cut x way to train x micro-batch; memory, bytes, hours, the rows that fit and the choice.

The figures of a row come from the parties' own code run without data (`costs`), at the speed of a machine (`machine`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from hosl.config import Config
from hosl.core.methods import METHODS
from hosl.errors import ConfigError, SplitError
from hosl.methods.variants import FORWARD, VARIANTS, Variant
from hosl.parties.micro_batches import TOKENS_AT_ONCE
from hosl.planner.costs import (
    PartyCost,
    Traffic,
    along_cuts,
    client_cost_at,
    lowest_cut,
    lowest_with_block,
    server_cost,
    trains_all_blocks,
    with_cut,
)
from hosl.planner.edge_memory import EdgeShape, PlannedMemory, planned_memory
from hosl.planner.machine import Machine
from hosl.planner.model_shape import ModelShape
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.split.families import Head
from hosl.transport.link import LinkSpec

# cheap and forward-only first, backprop last
PLANNED = tuple(
    variant.name
    for variant in sorted(VARIANTS, key=lambda variant: list(METHODS).index(variant.method))
    if variant.planned
)
"""The names of the variants that a plan compares by default."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The model, the run and the machines of a plan."""

    shape: ModelShape
    base: Config
    """Settings that every row shares: directions, distribution, steps, optimisers, wire."""
    rows: int
    """Rows of the longest batch; a candidate answer is a row."""
    tokens: int
    """Tokens per row."""
    client: Machine
    server: Machine
    link: LinkSpec = field(default_factory=LinkSpec)
    device_memory_bytes: float | None = None
    """The limit of the client process; None: every row fits."""
    runtime_base_bytes: float = RUNTIME_BASE_BYTES
    engine: EdgeShape | None = None
    """All blocks as a client on the inference engine holds them; then `fits` is of its process. None: it is torch's."""


@dataclass(frozen=True)
class PlanRow:
    """One way to run at one cut, and its costs."""

    name: str
    config: Config
    client: PartyCost
    server: PartyCost
    traffic: Traffic
    client_process_bytes: float
    client_s: float
    wire_s: float
    server_s: float
    fits: bool
    engine: PlannedMemory | None = None
    """The memory of a client on the inference engine, where it was asked for."""

    @property
    def device_process_bytes(self) -> float:
        """The process that `fits` is about."""
        return self.client_process_bytes if self.engine is None else self.engine.process_bytes

    @property
    def cut(self) -> int:
        """Blocks on the client."""
        return self.config.model.cut

    @property
    def step_s(self) -> float:
        """Seconds of a step, one side after the other."""
        return self.client_s + self.wire_s + self.server_s

    @property
    def hours(self) -> float:
        """Hours of all steps of the run, without its start and evaluations."""
        return self.step_s * self.config.max_steps / 3600


def plan(
    question: Question,
    *,
    cuts: Sequence[int],
    names: Sequence[str] = PLANNED,
    say: Callable[[str], None] = lambda text: None,
) -> list[PlanRow]:
    """The rows of every named way at every cut: with its usual micro-batches and, if that does not fit, row by row.

    Args:
        question: the model, the run and the machines.
        cuts: blocks on the client.
        names: names of variants (`hosl.methods.variants`), first one that any model can be trained by.
        say: is called with a line for each way that this family does not have; it is left out.

    Raises:
        ConfigError, SplitError: if the model cannot be cut so.
    """
    by_name = {row.name: row for row in VARIANTS}
    rows: list[PlanRow] = []
    servers = _Servers(question)
    for name in names:
        try:
            usual = _along(question, by_name[name], cuts, servers, micro_batch_size=None)
        except (ConfigError, SplitError) as reason:
            if not rows:
                raise
            say(f"without {name}: {reason}")
            continue
        rows += usual
        if METHODS[by_name[name].method].backward != "graph" and any(
            _activations_are_too_much(question, row) for row in usual
        ):
            rows += _along(question, by_name[name], cuts, servers, micro_batch_size=1)
    return sorted(
        rows, key=lambda row: (row.cut, names.index(row.name), row.config.client.micro_batch_size or 0)
    )


def _activations_are_too_much(question: Question, row: PlanRow) -> bool:
    """Whether smaller micro-batches could make the row fit; assumed is a quarter of the activations."""
    limit, client = question.device_memory_bytes, row.client
    if row.fits or limit is None:
        return False
    if row.engine is not None:
        one = _engine_memory(question, _with_rows_at_once(row.config, 1))
        return one is not None and one.process_bytes <= limit
    least = max(client.static_bytes + (client.peak_bytes - client.static_bytes) / 4, client.loading_bytes)
    return least + question.runtime_base_bytes < limit


def of_config(question: Question, name: str = "as configured") -> PlanRow:
    """The row of `question.base` itself, exact at its own cut."""
    config = question.base
    client, traffic = client_cost_at(config, question.shape, question.rows, question.tokens)
    server = server_cost(config, question.shape, question.rows, question.tokens)
    return _row(question, name, config, client, server, traffic)


_EVIDENCE: dict[tuple[Head, str], str] = {
    ("classification", "hosl-node"): "stands first on BANKING77, a classifier (docs/results/banking77.md)",
    **{
        ("causal", v.name): "learned most on a language model, SmolLM2-135M (docs/results/residual.md)"
        for v in VARIANTS
        if v.choice_of_texts is not None
    },
}
"""What a recommended way was seen to do on a model with this head."""
_NEXT = "comes next by what was measured (docs/results/index.md)"


def recommended(rows: Sequence[PlanRow], *, cut: int, head: Head = "classification") -> tuple[PlanRow, str]:
    """The row to take, and the reason: the forward-only way that learns most, at `cut` or the nearest cut below.

    Args:
        rows: the rows of a plan.
        cut: the cut that is wanted.
        head: the head of the model, for the evidence.

    Raises:
        ConfigError: if none of these ways fits.
    """
    fitting = [row for row in rows if row.fits]
    for name in _by_choice(head):
        same = [row for row in fitting if row.name == name and row.cut <= cut]
        if same:
            row = max(same, key=lambda row: (row.cut, -(row.config.client.micro_batch_size is not None)))
            compared = any(other.cut == cut for other in rows)
            lower = (
                "" if row.cut == cut else f"; cut {cut} {'does not fit' if compared else 'was not compared'}"
            )
            if name == FORWARD.name:
                return row, f"of the forward-only ways compared only frozen fits, which trains nothing{lower}"
            return (
                row,
                f"of the forward-only ways that fit, {name} {_EVIDENCE.get((head, name), _NEXT)}{lower}",
            )
    raise nothing_recommended(rows, cut)


def nothing_recommended(rows: Sequence[PlanRow], cut: int) -> ConfigError:
    """The error of a plan of which no row fits, or none of those that a plan recommends up to `cut`."""
    if fitting := list(dict.fromkeys(row.name for row in rows if row.fits)):
        return ConfigError(
            f"nothing to recommend: of the ways that were compared, {'; '.join(fitting)} would fit, and a plan "
            f"recommends none of these at cut {cut} or below; compare others (--ways, --cuts)"
        )
    smallest = min(rows, key=lambda row: row.device_process_bytes)
    return ConfigError(
        f"nothing fits: the least is {smallest.name} at cut {smallest.cut} with "
        f"{smallest.device_process_bytes / 2**20:.0f} MiB for the client process; give the device more "
        "memory, or take a smaller model or shorter texts"
    )


@dataclass(frozen=True)
class Demand:
    """The memory that a client process needs for one kind of batch; computed when it is read."""

    rows: int
    """Rows of the batch."""
    compute: Callable[[], float]
    """Computes `needed_bytes`, by a step without data."""

    @cached_property
    def needed_bytes(self) -> float:
        """The peak of the process, weights and Python included."""
        return self.compute()


def nearest_that_fits(
    config: Config, tokens: int, demands_of: Callable[[Config], Sequence[Demand]], limit_bytes: float
) -> Config | None:
    """The config with the least change that fits: smaller micro-batches, then a lower cut; None: neither helps.

    Args:
        config: a config that does not fit.
        tokens: tokens per row.
        demands_of: the demands of a config, one for each kind of batch; the same objects at every call.
        limit_bytes: the limit of the process.
    """

    def fits(tried: Config) -> bool:
        return all(demand.needed_bytes <= limit_bytes for demand in demands_of(tried))

    base = config
    if base.method_row.backward != "graph" and base.client.micro_batch_size != 1:
        usual = config.client.micro_batch_size or max(TOKENS_AT_ONCE // tokens, 1)
        rows = _rows_at_once(demands_of, config, usual, limit_bytes)
        if rows is not None:
            return _with_rows_at_once(config, rows)
        base = _with_rows_at_once(config, 1)
    lowest, highest = lowest_with_block(base), base.model.cut - 1
    if highest < lowest or not fits(with_cut(base, lowest)):
        return None
    at_lowest = most_needed(demands_of(with_cut(base, lowest)))
    a_block = max((most_needed(demands_of(base)) - at_lowest) / (base.model.cut - lowest), 1.0)
    guess = min(lowest + int((limit_bytes - at_lowest) / a_block), highest)
    tries = (with_cut(base, cut) for cut in range(guess, lowest - 1, -1))
    return next((tried for tried in tries if tried.model.cut == lowest or fits(tried)), None)


def most_needed(demands: Sequence[Demand]) -> float:
    """The bytes for the worst kind of batch."""
    return max(demand.needed_bytes for demand in demands)


def _rows_at_once(
    demands_of: Callable[[Config], Sequence[Demand]], config: Config, most: int, limit_bytes: float
) -> int | None:
    """The number of rows at once that fits; None: not even one row fits.

    A batch that fits with `most` rows at once fits with fewer, so only the others are tried. Memory is nearly linear in
    the rows at once, which gives a guess. The guess is verified, because the parts of a batch are gathered beside it.
    """
    usual = demands_of(config)
    tight = [index for index, demand in enumerate(usual) if demand.needed_bytes > limit_bytes]

    def fit(rows: int) -> bool:
        demands = demands_of(_with_rows_at_once(config, rows))
        return all(demands[index].needed_bytes <= limit_bytes for index in tight)

    if not fit(1):
        return None
    least, guesses = demands_of(_with_rows_at_once(config, 1)), [most]
    for index in tight:
        many, one = usual[index], least[index]
        share = (limit_bytes - one.needed_bytes) / (many.needed_bytes - one.needed_bytes)
        guesses.append(1 + int(share * (min(most, many.rows) - 1)))
    guess = min(guesses)
    return next((rows for rows in (guess, guess // 2) if rows > 1 and fit(rows)), 1)


def _with_rows_at_once(config: Config, rows: int) -> Config:
    client = msgspec.structs.replace(config.client, micro_batch_size=rows)
    return msgspec.structs.replace(config, client=client)


def _by_choice(head: Head) -> list[str]:
    """The names of the forward-only ways, the best one for models with this head first."""
    texts = [(v.choice_of_texts, v.name) for v in VARIANTS if v.choice_of_texts is not None]
    others = [(v.choice, v.name) for v in VARIANTS if v.choice is not None]
    ranked = [*(sorted(texts) if head == "causal" else ()), *sorted(others)]
    return list(dict.fromkeys(name for _, name in ranked))


class _Servers:
    """The costs of a server half; rows share them, because they depend on the cut and on few settings."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._costs: dict[tuple[str, str], dict[int, PartyCost]] = {}

    def at(self, config: Config, cuts: Sequence[int]) -> dict[int, PartyCost]:
        """The cost at each cut."""
        key = (config.method_row.on_the_wire, config.model.dtype)
        if key not in self._costs:
            shape, least = self._question.shape, lowest_with_block(config)
            total = shape.blocks

            def at(held: int) -> PartyCost:
                # a server with `held` blocks, in a model that has no more than its client needs beside them
                small = shape.of_blocks(held + least)
                return server_cost(with_cut(config, least), small, self._question.rows, self._question.tokens)

            by_held = along_cuts(at, (1, 2), [total - cut for cut in cuts])
            self._costs[key] = {cut: by_held[total - cut] for cut in cuts}
        return self._costs[key]


def _along(
    question: Question, row: Variant, cuts: Sequence[int], servers: _Servers, *, micro_batch_size: int | None
) -> list[PlanRow]:
    shape = question.shape
    blocks = question.base.residual.blocks
    lowest = lowest_cut(row.method, blocks, row.client.get("trainable", ""))
    usable = [cut for cut in cuts if cut >= lowest]
    configs = {cut: row.applied(question.base, cut=cut, micro_batch_size=micro_batch_size) for cut in usable}
    traffics: list[Traffic] = []

    def at(cut: int) -> PartyCost:
        config = row.applied(question.base, cut=cut, micro_batch_size=micro_batch_size)
        cost, traffic = client_cost_at(config, shape, question.rows, question.tokens)
        traffics.append(traffic)
        return cost

    if not usable:
        return []
    method, sampled = METHODS[row.method], _sampled(row, lowest, shape.blocks)
    # by thresholds, or with blocks that are evaluated for others: then no cut follows from others
    by_blocks = method.keeps_by_blocks or trains_all_blocks(row.method, blocks)
    each = by_blocks or sampled[1] > shape.blocks
    clients = {cut: at(cut) for cut in usable} if each else along_cuts(at, sampled, usable)
    return [
        _row(question, row.name, configs[cut], clients[cut], servers.at(configs[cut], cuts)[cut], traffics[0])
        for cut in usable
    ]


def _sampled(row: Variant, lowest: int, blocks: int) -> tuple[int, int]:
    """The two cuts from which all others follow, from the `lowest` that the row can be used at.

    Backprop treats the lowest block differently; adapters and methods of the last blocks need a block on the client.
    """
    method = METHODS[row.method]
    if method.backward != "none":
        lowest = max(lowest, 2 if blocks >= 3 else 1)
    elif method.needs_blocks or row.client.get("trainable"):
        lowest = max(lowest, 1)
    return lowest, lowest + 1


def _engine_memory(question: Question, config: Config) -> PlannedMemory | None:
    if question.engine is None:
        return None
    half = question.engine.of_blocks(config.model.cut)
    return planned_memory(config, half, question.rows, question.tokens)


def _row(
    question: Question, name: str, config: Config, client: PartyCost, server: PartyCost, traffic: Traffic
) -> PlanRow:
    process = question.runtime_base_bytes + max(client.peak_bytes, client.loading_bytes)
    engine = _engine_memory(question, config)
    on_device = process if engine is None else engine.process_bytes
    limit = question.device_memory_bytes
    link = question.link
    wire_s = traffic.round_trips * link.rtt_s
    for sent, rate in ((traffic.bytes_up, link.up_bits_per_s), (traffic.bytes_down, link.down_bits_per_s)):
        wire_s += 0.0 if rate is None else sent * 8 / rate
    return PlanRow(
        name, config, client, server, traffic, process,
        client_s=question.client.seconds(client.work, formed=client.formed, updated=client.updated),
        wire_s=wire_s, server_s=question.server.seconds(server.work), fits=limit is None or on_device <= limit,
        engine=engine,
    )  # fmt: skip
