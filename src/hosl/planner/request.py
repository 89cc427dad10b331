"""`hosl plan` around the planner: the question as it is asked, the task's longest batch, the table for people."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hosl.config import Config, ModelConfig, dump_config, load_config
from hosl.errors import ConfigError, SplitError
from hosl.methods.schedule import longest_batch, most_scored, with_steps
from hosl.planner.dry_run import Work
from hosl.planner.machine import assumed_cpu, assumed_server, probed
from hosl.planner.model_shape import ModelShape, model_shape
from hosl.planner.on_engine import (
    names_on_engine,
    recommended_on_engine,
    shape_on_engine,
    with_named_adapters,
)
from hosl.planner.plan import PLANNED, PlanRow, Question, of_config, plan, recommended
from hosl.planner.planned_ranks import PlannedRanks, own_bytes, own_lines, planned_ranks
from hosl.planner.server_ranks import check_ranks
from hosl.split import resolve_model_folder, transformers_tokenizer
from hosl.system.allocator import return_freed_memory
from hosl.system.gc_paused import gc_paused
from hosl.system.readable import aligned, readable_bytes, readable_count
from hosl.tasks import Task, TaskConfig, TextTokenizer, load_task, model_labels
from hosl.transport.link import LinkSpec

_TOKENS = 256
_CUTS = 12


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Question of `hosl plan` as it is asked."""

    what: str
    settings: Callable[[Config], Config] = lambda base: base
    """Changes the settings of the file, or the defaults."""
    device_memory_bytes: float | None = None
    link: LinkSpec
    rows: int | None = None
    tokens: int | None = None
    cuts: tuple[int, ...] | None = None
    cores: int = 1
    probe: bool = False
    server_tera_flops: float = 10.0
    on_engine: bool = False
    """Whether the device computes on an inference engine (the onnx runtime)."""
    ways: tuple[str, ...] | None = None
    """The names of the variants to compare; None: the usual ones."""
    ranks: int | None = None
    """The processes that have the server's half together; None: one."""
    rank_memory_bytes: float | None = None
    """The limit of each of them; None: every layout fits."""
    between_ranks_bits_per_s: float = 0.0
    """What a rank gets from the others in a second."""


@dataclass(frozen=True)
class Planned:
    """Rows of a plan and what follows from them."""

    question: Question
    rows: Sequence[PlanRow]
    chosen: PlanRow | None
    why: str
    asked: Config
    """The settings as they were given; `question.base` has a number, or none, for client.learning_rate."""
    speed: str
    """The speeds of both sides in words, and whether they were measured."""
    ranks: PlannedRanks | None = None
    """The server of the recommended row over several ranks, where it was asked for."""

    def facts(self) -> dict[str, Any]:
        """Content of --json: units in the names."""
        question = self.question
        return {
            "model": question.shape.name, "blocks": question.shape.blocks, "rows": question.rows,
            "tokens": question.tokens, "steps": question.base.max_steps,
            "device_memory_bytes": question.device_memory_bytes, "speed": self.speed, "why": self.why,
            "recommended": _facts(self.chosen) if self.chosen else None,
            "ways": [_facts(row) for row in self.rows],
            **({} if self.ranks is None else {"server_ranks": self.ranks.facts()}),
        }  # fmt: skip

    def table(self, *, every_row: bool = False) -> str:
        """Table for people: what fits is marked, the recommended row with an arrow.

        Without `every_row`, it has every way at the cut of the recommended row, and that way at every cut.
        """
        question, chosen = self.question, self.chosen
        cut = min(question.base.model.cut, question.shape.blocks) if chosen is None else chosen.cut
        shown = [
            row for row in self.rows
            if every_row or row.cut == cut or (chosen is not None and row.name == chosen.name)
        ]  # fmt: skip
        limit = question.device_memory_bytes
        head = (
            f"{question.shape.name}, {question.shape.blocks} blocks, batches of {question.rows} x {question.tokens} "
            f"tokens, {readable_count(question.base.max_steps, 'step')}; "
            f"device: {'no limit' if limit is None else readable_bytes(limit)}"
        )
        columns = [
            "", "cut", "way", "rows at once",
            *(["onnx tensors", "onnx process", "torch tensors", "torch process"] if question.engine
              else ["client tensors", "process"]),
            "server", "up/step", "down/step", "client s", "wire s", "server s", "hours",
        ]  # fmt: skip
        lines = [columns, *(_cells(row, row is chosen) for row in shown)]
        folded = len(self.rows) - len(shown)
        more = [f"{readable_count(folded, 'more row')}, of other cuts: --all"] if folded else []
        text = [*aligned(lines, left="way"), *more, "", f"+ fits, -> recommended: {self.why}"]
        text += [] if self.chosen is None else own_lines(self.chosen)
        text += [] if self.ranks is None else ["", *self.ranks.lines()]
        return "\n".join([head, self.speed, "", *text, ""])

    def write(self, path: Path) -> None:
        """Write the recommended row as a config that `hosl train` reads.

        Raises:
            ConfigError: if nothing fits.
        """
        if self.chosen is None:
            raise ConfigError(f"there is nothing to write: {self.why}")
        config, asked = self.chosen.config, self.asked
        if _rated_alike(config) == _rated_alike(asked):
            config = config.with_client_rate(asked.client.learning_rate)
        elif config.client.learning_rate is not None:  # of another method: it has its usual one
            config = config.with_client_rate(None)
        path.write_text(dump_config(config), encoding="utf-8")


def _rated_alike(config: Config) -> tuple[object, ...]:
    """The settings with which a learning rate can be taken over."""
    return config.method, config.client.trainable, config.client.optimiser


def planned(asked: Planning, say: Callable[[str], None] = lambda text: None) -> Planned:
    """Answer; `say` hears what takes a while.

    Raises:
        ConfigError, SplitError, ModelError, TaskError: if there is no such model, or it cannot be cut or trained so.
    """
    config, question = _question(asked, say)
    if asked.ranks is not None:
        check_ranks(question.base, asked.ranks)
    shape, base = question.shape, question.base
    speed = (
        f"device assumed: {readable_count(asked.cores, 'core')} at 40 GFLOP/s (--cores, --probe measures it)"
    )
    cuts = asked.cuts or _spread(shape.blocks, base.model.cut)
    outside = [cut for cut in cuts if not 0 <= cut <= shape.blocks]
    if outside:
        raise SplitError(
            f"cut={outside[0]} is outside 0..{shape.blocks}: {shape.name} has {shape.blocks} blocks"
        )
    if asked.probe:
        say("measuring this machine")
        return_freed_memory()  # as `hosl join` does: fresh pages take their time
        work = of_config(question).client.work
        question = _with_machine(question, work)
        speed = "device measured: this machine"
    with gc_paused():
        names = (
            asked.ways or PLANNED if question.engine is None else names_on_engine(question, asked.ways, say)
        )
        rows = plan(question, cuts=cuts, names=names, say=say)
    try:
        chosen, why = (
            recommended(rows, cut=base.model.cut, head=shape.head)
            if question.engine is None
            else recommended_on_engine(rows, cut=base.model.cut)
        )
    except ConfigError as nothing:
        chosen, why = None, str(nothing)
    speed += f"; server assumed: {asked.server_tera_flops:g} TFLOP/s (--server-tflops)"
    ranks = _ranks(asked, question, chosen, say)
    return Planned(question, rows, chosen, why, config, speed, ranks)


def _ranks(
    asked: Planning, question: Question, chosen: PlanRow | None, say: Callable[[str], None]
) -> PlannedRanks | None:
    """The server of the recommended row over several ranks, if it was asked for; `say` hears why there is none."""
    if asked.ranks is None:
        return None
    if chosen is None:
        say("--ranks: no row is recommended whose server could be planned")
        return None
    try:
        return planned_ranks(
            question, chosen, ranks=asked.ranks, limit_bytes=asked.rank_memory_bytes,
            between_bytes_per_s=asked.between_ranks_bits_per_s / 8,
        )  # fmt: skip
    except ConfigError as reason:
        say(str(reason))
        return None


def task_for(config: TaskConfig, model: str, seed: int) -> Task:
    """The task of a config, read with the tokenizer of a model.

    Raises:
        ConfigError, ModelError, TaskError: if there is no such model, or the data cannot be read.
    """
    folder = resolve_model_folder(model)
    tokenizer = TextTokenizer.load(folder, transformers_tokenizer)
    return load_task(config, tokenizer, seed=seed, model_labels=model_labels(folder))


def without_auto(config: Config) -> Config:
    """The config with the usual rate in place of auto: a sweep finds auto's number, and no cost depends on it."""
    return config.with_client_rate(None) if config.client.learning_rate == "auto" else config


def shape_of(config: Config, task: Task) -> ModelShape:
    """The shape of a config's model, with the head that its task needs."""
    labels = len(task.labels) if task.head == "classification" else None
    shape = model_shape(config.model.name, head=task.head, num_labels=labels)
    return replace(shape, scored_tokens=most_scored(task))


def _question(asked: Planning, say: Callable[[str], None]) -> tuple[Config, Question]:
    """The settings as given, and the question that follows from them."""
    if asked.what.endswith((".yaml", ".yml")):
        config = asked.settings(load_config(asked.what))
        say(f"reading the task of {asked.what}")
        task = task_for(config.task, config.model.name, config.seed)
        config, shape = with_steps(config, task), shape_of(config, task)
        rows, tokens = longest_batch(task, config)
    else:
        shape = model_shape(asked.what)
        config = asked.settings(Config(model=ModelConfig(name=asked.what, cut=max(shape.blocks // 2, 1))))
        rows, tokens = config.per_device_train_batch_size, min(_TOKENS, shape.longest or _TOKENS)
    tokens = asked.tokens or tokens
    if shape.longest is not None and tokens > shape.longest:
        raise ConfigError(f"--tokens {tokens}: {shape.name} reads {shape.longest} positions at most")
    base = without_auto(config)
    engine = None
    if asked.on_engine:
        base, engine = with_named_adapters(base, shape), shape_on_engine(shape)
    return config, Question(
        shape=shape, base=base, rows=asked.rows or rows, tokens=tokens, client=assumed_cpu(asked.cores),
        server=assumed_server(asked.server_tera_flops), link=asked.link, device_memory_bytes=asked.device_memory_bytes,
        engine=engine,
    )  # fmt: skip


def _with_machine(question: Question, work: Work) -> Question:
    return replace(question, client=probed(work, question.base.zo.distribution, base=question.client))


def _spread(blocks: int, wanted: int) -> list[int]:
    """At most `_CUTS` cuts from the first block to the last, the wanted one among them."""
    step = max(-(-blocks // _CUTS), 1)
    return sorted({*range(step, blocks + 1, step), min(wanted, blocks), blocks})


def _cells(row: PlanRow, chosen: bool) -> list[str]:
    at_once = row.config.client.micro_batch_size
    engine = () if row.engine is None else (row.engine.tensor_bytes, row.engine.process_bytes)
    sizes = *engine, row.client.peak_bytes, row.client_process_bytes, row.server.peak_bytes
    return [
        "->" if chosen else "+" if row.fits else "", str(row.cut), row.name,
        "usual" if at_once is None else str(at_once),
        *map(readable_bytes, (*sizes, row.traffic.bytes_up, row.traffic.bytes_down)),
        *(f"{number:.2f}" for number in (row.client_s, row.wire_s, row.server_s, row.hours)),
    ]  # fmt: skip


def _facts(row: PlanRow) -> dict[str, Any]:
    engine = {} if row.engine is None else {
        "onnx_tensor_peak_bytes": round(row.engine.tensor_bytes),
        "onnx_own_page_bytes": round(row.engine.anonymous_bytes),
        "onnx_file_page_bytes": round(row.engine.file_bytes),
        "onnx_process_bytes": round(row.engine.process_bytes),
    }  # fmt: skip
    return engine | {
        "cut": row.cut, "way": row.name, "method": row.config.method, "fits": row.fits,
        "micro_batch_size": row.config.client.micro_batch_size,
        "client_static_bytes": round(row.client.static_bytes),
        "client_tensor_peak_bytes": round(row.client.peak_bytes),
        "client_process_bytes": round(row.client_process_bytes),
        "server_tensor_peak_bytes": round(row.server.peak_bytes), "server_bytes_per_device": own_bytes(row),
        "bytes_up": row.traffic.bytes_up,
        "bytes_down": row.traffic.bytes_down, "round_trips": row.traffic.round_trips,
        "client_s": round(row.client_s, 4), "wire_s": round(row.wire_s, 4), "server_s": round(row.server_s, 4),
        "hours": round(row.hours, 3),
    }  # fmt: skip
