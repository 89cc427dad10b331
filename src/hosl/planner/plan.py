"""The table of `hosl plan`: cut x way to train x micro-batch; memory, bytes, hours, what fits and what to take.

A row's figures are those of the parties' own code run without data (`costs`), at a machine's speed (`machine`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.methods.rows import ROWS, Row
from hosl.parties.clients.frozen import TOKENS_AT_ONCE
from hosl.planner.costs import (
    PartyCost,
    Traffic,
    along_cuts,
    client_cost_at,
    lowest_cut,
    lowest_with_block,
    server_cost,
    with_cut,
)
from hosl.planner.machine import Machine
from hosl.planner.model_shape import ModelShape
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.transport.link import LinkSpec

PLANNED = (
    "frozen", "hosl", "hosl-gradient", "hosl-node", "hosl-gradient, bfloat16", "hosl-gradient, int8 + LoRA",
    "fo-recompute, last block", "fo-recompute", "fo-fo",
)  # fmt: skip
"""The rows of `hosl.methods.rows` that a plan compares where it is not told otherwise."""

_LEARNS = ("hosl-node", "hosl-guided", "hosl-gradient", "hosl-gradient, int8 + LoRA", "hosl", "frozen")
"""Forward-only ways, the one that closed most of the gap first (docs/results/index.md)."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a plan is asked."""

    shape: ModelShape
    base: Config
    """Settings that every row shares: directions, distribution, steps, optimisers, wire."""
    rows: int
    """Of the longest batch; a candidate answer is a row."""
    tokens: int
    """Per row."""
    client: Machine
    server: Machine
    link: LinkSpec = field(default_factory=LinkSpec)
    device_memory_bytes: float | None = None
    """What the client process may take; None: everything fits."""
    runtime_base_bytes: float = RUNTIME_BASE_BYTES


@dataclass(frozen=True)
class PlanRow:
    """One way to run, and what it takes."""

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

    @property
    def cut(self) -> int:
        """Blocks on the client."""
        return self.config.model.cut

    @property
    def step_s(self) -> float:
        """A step, one side after the other."""
        return self.client_s + self.wire_s + self.server_s

    @property
    def hours(self) -> float:
        """Of the whole run's steps; evaluation and start are left out."""
        return self.step_s * self.config.max_steps / 3600


def plan(question: Question, *, cuts: Sequence[int], names: Sequence[str] = PLANNED) -> list[PlanRow]:
    """Every named way at every cut, at the batch's usual micro-batches and, where that does not fit, row by row.

    Raises:
        ConfigError, SplitError: if the model cannot be cut so.
    """
    by_name = {row.name: row for row in ROWS}
    found: list[PlanRow] = []
    servers = _Servers(question)
    for name in names:
        usual = _along(question, by_name[name], cuts, servers, micro_batch_size=None)
        found += usual
        if by_name[name].method not in ("fo-fo", "fo-zo") and any(
            _activations_are_too_much(question, row) for row in usual
        ):
            found += _along(question, by_name[name], cuts, servers, micro_batch_size=1)
    return sorted(
        found, key=lambda row: (row.cut, names.index(row.name), row.config.client.micro_batch_size or 0)
    )


def _activations_are_too_much(question: Question, row: "PlanRow") -> bool:
    """Whether smaller micro-batches could make the row fit: at a guess, with a quarter of the activations."""
    limit, client = question.device_memory_bytes, row.client
    if row.fits or limit is None:
        return False
    least = max(client.static_bytes + (client.peak_bytes - client.static_bytes) / 4, client.loading_bytes)
    return least + question.runtime_base_bytes < limit


def of_config(question: Question, name: str = "as configured") -> PlanRow:
    """The row of `question.base` itself, exact at its own cut."""
    config = question.base
    client, traffic = client_cost_at(config, question.shape, question.rows, question.tokens)
    server = server_cost(config, question.shape, question.rows, question.tokens)
    return _row(question, name, config, client, server, traffic)


def recommended(rows: Sequence[PlanRow], *, cut: int) -> tuple[PlanRow, str]:
    """The row to take, and why: at the wanted cut or the nearest below, the forward-only way that learns most.

    Raises:
        ConfigError: if nothing fits.
    """
    fitting = [row for row in rows if row.fits]
    for name in _LEARNS:
        same = [row for row in fitting if row.name == name and row.cut <= cut]
        if same:
            row = max(same, key=lambda row: (row.cut, -(row.config.client.micro_batch_size is not None)))
            lower = "" if row.cut == cut else f"; cut {cut} does not fit"
            return (
                row,
                f"of the forward-only ways that fit, {name} stands first on BANKING77 (docs/results/index.md){lower}",
            )
    smallest = min(rows, key=lambda row: row.client_process_bytes)
    raise ConfigError(
        f"nothing fits: the least is {smallest.name} at cut {smallest.cut} with "
        f"{smallest.client_process_bytes / 2**20:.0f} MiB for the client process; give the device more "
        "memory, or take a smaller model or shorter texts"
    )


@dataclass(frozen=True)
class Demand:
    """What one kind of batch makes a client process take; found when it is asked for, by a step run without data."""

    rows: int
    """Of the batch."""
    find: Callable[[], float]
    """Gives `needed_bytes`."""

    @cached_property
    def needed_bytes(self) -> float:
        """The process's peak, weights and base included."""
        return self.find()


def nearest_that_fits(
    config: Config, tokens: int, takes: Callable[[Config], Sequence[Demand]], limit_bytes: float
) -> Config | None:
    """The least change with which the client fits: smaller micro-batches, then a lower cut; None: neither helps.

    Args:
        config: what does not fit.
        tokens: per row.
        takes: what a client takes under a config, for each kind of batch; the same objects when it is asked again.
        limit_bytes: what the process may take.
    """

    def fits(tried: Config) -> bool:
        return all(demand.needed_bytes <= limit_bytes for demand in takes(tried))

    base = config
    if base.method not in ("fo-fo", "fo-zo") and base.client.micro_batch_size != 1:
        usual = config.client.micro_batch_size or max(TOKENS_AT_ONCE // tokens, 1)
        rows = _rows_at_once(takes, config, usual, limit_bytes)
        if rows is not None:
            return _with_rows_at_once(config, rows)
        base = _with_rows_at_once(config, 1)
    lowest, highest = lowest_with_block(base), base.model.cut - 1
    if highest < lowest or not fits(with_cut(base, lowest)):
        return None
    at_lowest = most_needed(takes(with_cut(base, lowest)))
    a_block = max((most_needed(takes(base)) - at_lowest) / (base.model.cut - lowest), 1.0)
    guess = min(lowest + int((limit_bytes - at_lowest) / a_block), highest)
    tries = (with_cut(base, cut) for cut in range(guess, lowest - 1, -1))
    return next((tried for tried in tries if tried.model.cut == lowest or fits(tried)), None)


def most_needed(demands: Sequence[Demand]) -> float:
    """Bytes of the worst kind of batch."""
    return max(demand.needed_bytes for demand in demands)


def _rows_at_once(
    takes: Callable[[Config], Sequence[Demand]], config: Config, most: int, limit_bytes: float
) -> int | None:
    """How many rows at once fit; None: not even one.

    A batch that fits with `most` fits with fewer, so only the others are asked about. Memory is near a line in the rows
    at once, which gives a guess; but a batch not taken whole is gathered beside its parts, so the guess is verified.
    """
    usual = takes(config)
    tight = [place for place, demand in enumerate(usual) if demand.needed_bytes > limit_bytes]

    def fit(rows: int) -> bool:
        demands = takes(_with_rows_at_once(config, rows))
        return all(demands[place].needed_bytes <= limit_bytes for place in tight)

    if not fit(1):
        return None
    least, guesses = takes(_with_rows_at_once(config, 1)), [most]
    for place in tight:
        many, one = usual[place], least[place]
        share = (limit_bytes - one.needed_bytes) / (many.needed_bytes - one.needed_bytes)
        guesses.append(1 + int(share * (min(most, many.rows) - 1)))
    guess = min(guesses)
    return next((rows for rows in (guess, guess // 2) if rows > 1 and fit(rows)), 1)


def _with_rows_at_once(config: Config, rows: int) -> Config:
    client = msgspec.structs.replace(config.client, micro_batch_size=rows)
    return msgspec.structs.replace(config, client=client)


class _Servers:
    """Costs of a server half: they depend on the cut and on few settings, so rows share them."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._known: dict[tuple[str, str], dict[int, PartyCost]] = {}

    def at(self, config: Config, cuts: Sequence[int]) -> dict[int, PartyCost]:
        """By cut."""
        asks = config.method if config.method in ("hosl", "frozen", "zo-zo", "fo-zo") else "with gradient"
        key = (asks, config.model.dtype)
        if key not in self._known:
            shape = self._question.shape
            total = shape.blocks

            def at(held: int) -> PartyCost:
                # a server with `held` blocks, in a model that has one more
                small = shape.of_blocks(held + 1)
                of_held = with_cut(config, 1)
                return server_cost(of_held, small, self._question.rows, self._question.tokens)

            by_held = along_cuts(at, (1, 2), [total - cut for cut in cuts])
            self._known[key] = {cut: by_held[total - cut] for cut in cuts}
        return self._known[key]


def _along(
    question: Question, row: Row, cuts: Sequence[int], servers: _Servers, *, micro_batch_size: int | None
) -> list[PlanRow]:
    shape = question.shape
    lowest = lowest_cut(row.method, question.base.zo.guided_blocks, row.client.get("trainable", ""))
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
    sampled = _sampled(row, shape.blocks)
    clients = along_cuts(at, sampled, usable)
    return [
        _row(question, row.name, configs[cut], clients[cut], servers.at(configs[cut], cuts)[cut], traffics[0])
        for cut in usable
    ]


def _sampled(row: Row, blocks: int) -> tuple[int, int]:
    """Two cuts from which all others follow.

    Backprop treats the lowest block unlike the others; adapters and guided blocks want a block to be in.
    """
    if row.method.startswith("fo-"):
        return (2, 3) if blocks >= 3 else (1, 2)
    alike = row.method in ("frozen", "hosl", "hosl-gradient", "zo-zo") and not row.client.get("trainable")
    return (0, 1) if alike else (1, 2)


def _row(
    question: Question, name: str, config: Config, client: PartyCost, server: PartyCost, traffic: Traffic
) -> PlanRow:
    process = question.runtime_base_bytes + max(client.peak_bytes, client.loading_bytes)
    limit = question.device_memory_bytes
    link = question.link
    wire_s = traffic.round_trips * link.rtt_s
    for sent, rate in ((traffic.bytes_up, link.up_bits_per_s), (traffic.bytes_down, link.down_bits_per_s)):
        wire_s += 0.0 if rate is None else sent * 8 / rate
    return PlanRow(
        name, config, client, server, traffic, process,
        client_s=question.client.seconds(client.work, formed=client.formed, updated=client.updated),
        wire_s=wire_s, server_s=question.server.seconds(server.work), fits=limit is None or process <= limit,
    )  # fmt: skip
