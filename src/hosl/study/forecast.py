"""What a study will take, before anything runs: of each row its runs, the memory of both halves, the hours, a command.

A row is planned as `hosl plan` plans one (docs/adr/0009): the parties' own code on tensors without data, memory for
the longest batch, time for batches of the usual length. Where the model or the data are not at hand, a known shape of
the same name and the config's `task.max_tokens` stand in, and it is said.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from hosl.config import Config
from hosl.errors import HoslError, ModelError
from hosl.methods.schedule import longest_batch, usual_batch, with_steps
from hosl.planner.machine import Machine, assumed_cpu, assumed_server
from hosl.planner.model_shape import ModelShape, model_shape
from hosl.planner.plan import PlanRow, Question, of_config
from hosl.planner.request import shape_of, task_for, without_auto
from hosl.split.shapes import SHAPES
from hosl.study.config import Study, study_grid
from hosl.system.readable import aligned, readable_bytes
from hosl.tasks import Task, TaskConfig

_TOKENS = 256
ACCELERATOR_TERA_FLOPS = 10.0
"""What an accelerator's products are assumed to reach; a CPU: one core, as of `hosl plan`."""


@dataclass(frozen=True, kw_only=True)
class RowForecast:
    """The costs of one row of a study, all its rates and seeds together."""

    row: str
    method: str
    runs: int
    client_tensor_peak_bytes: int
    server_tensor_peak_bytes: int
    step_s: float
    """Seconds of a training step of usual length, both sides."""
    hours: float
    """Hours of all steps of all its runs, one after the other, without evaluations."""
    command: str
    """Makes its first run alone."""


def forecast(study: Study, command: str, say: Callable[[str], None]) -> list[RowForecast]:
    """The rows in the order of the study.

    Args:
        study: the study, whose settings are checked.
        command: `hosl study FILE`.
        say: is called with a line for what had to be assumed, once.

    Raises:
        ConfigError, SplitError, ModelError: if there is no such model, or it cannot be cut or trained so.
    """
    grid, said = study_grid(study), set[str]()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    planned: dict[str, PlanRow] = {}
    rows = []

    def plan_of(question: Question, row: str) -> PlanRow:
        same = _costs_depend_on(question)
        if same not in planned:  # tasks of one length cost the same
            say_once(f"planning {row}")
            planned[same] = of_config(question)
        return planned[same]

    for arm in grid.arms:
        trial = next(run for run in grid.conceivable if run.arm is arm)
        longest, usual = _questions(trial.config(study.output_dir), say_once)
        memory, time, runs = plan_of(longest, arm.name), plan_of(usual, arm.name), grid.runs_of(arm, {})
        rows.append(
            RowForecast(
                row=arm.name, method=longest.base.method, runs=runs,
                client_tensor_peak_bytes=round(memory.client.peak_bytes),
                server_tensor_peak_bytes=round(memory.server.peak_bytes), step_s=time.step_s, hours=time.hours * runs,
                command=f"{command} --run {trial.name}",
            )
        )  # fmt: skip
    return rows


def facts(rows: list[RowForecast], at_once: int) -> dict[str, Any]:
    """Plain data for --json."""
    return {
        "hours": sum(row.hours for row in rows) / at_once,
        "at_once": at_once,
        "rows": [asdict(row) for row in rows],
    }


def table(rows: list[RowForecast], at_once: int) -> str:
    """The table for people."""
    cells = [["row", "runs", "client tensors", "server tensors", "step, s", "hours"]]
    cells += [
        [row.row, str(row.runs), readable_bytes(row.client_tensor_peak_bytes),
         readable_bytes(row.server_tensor_peak_bytes), f"{row.step_s:.2f}", f"{row.hours:.2f}"]
        for row in rows
    ]  # fmt: skip
    hours = sum(row.hours for row in rows) / at_once
    runs = sum(row.runs for row in rows)
    together = f"{runs} runs, {at_once} at a time: {hours:.1f} hours, evaluations apart"
    return "\n".join([*aligned(cells, left="row"), "", together, ""])


def _questions(config: Config, say: Callable[[str], None]) -> tuple[Question, Question]:
    """A batch of the longest rows, by which memory is planned, and one of the usual length, by which time is."""
    task, shape = _task(config), _shape(config, say)
    if not isinstance(task, str):
        config, (rows, tokens) = with_steps(config, task), longest_batch(task, config)
        usual, scored = usual_batch(task, config)
    else:
        most, rows = config.task.max_tokens, config.per_device_train_batch_size
        tokens = most if isinstance(most, int) else _TOKENS
        epochs = "" if config.num_train_epochs is None else f", and for {config.max_steps} steps"
        say(f"{task}; planned by rows of {tokens} tokens{epochs}")
        usual, scored = tokens, shape.scored_tokens
    if shape.longest is not None:
        tokens, usual = min(tokens, shape.longest), min(usual, shape.longest)
    client, server = (_machine(device) for device in (config.client.device, config.server.device))
    longest = Question(
        shape=shape, base=without_auto(config), rows=rows, tokens=tokens, client=client, server=server
    )
    return longest, replace(longest, shape=replace(shape, scored_tokens=scored), tokens=usual)


def _costs_depend_on(question: Question) -> str:
    """What two rows of equal costs have in common: all but folder, seed, rates and the data themselves."""
    plain = msgspec.to_builtins(question.base.with_client_rate(None))
    for name in ("output_dir", "seed", "task"):
        del plain[name]
    del plain["server"]["learning_rate"]
    shape = question.shape
    labels = getattr(shape.config, "num_labels", None)
    return repr((plain, question.rows, question.tokens, shape.name, shape.head, labels, shape.scored_tokens))


def _machine(device: str) -> Machine:
    return assumed_cpu(1) if device == "cpu" else assumed_server(ACCELERATOR_TERA_FLOPS)


def _shape(config: Config, say: Callable[[str], None]) -> ModelShape:
    task, name = _task(config), config.model.name
    if not isinstance(task, str):
        return shape_of(config, task)
    if _is_here(name):
        return model_shape(name)
    known = name.rpartition("/")[2].lower()
    if known not in SHAPES:
        raise ModelError(
            f"model {name} is not here, and a dry run downloads nothing; known shapes are {', '.join(SHAPES)}"
        )
    say(f"{name} is not here: planned by the known shape {known}")
    return model_shape(known)


def _is_here(name: str) -> bool:
    """Whether a model is a folder, a file or in the hub's cache; a name that is nothing at all is refused later."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _task(config: Config) -> Task | str:
    """The task, or why there is none: it, or the model's tokenizer, is not here, or a run would refuse it."""
    if not _is_here(config.model.name):
        return f"the tokenizer of {config.model.name} is not here"
    return _loaded(msgspec.json.encode(config.task), config.model.name, config.seed)


@cache
def _loaded(task: bytes, model: str, seed: int) -> Task | str:
    try:
        return task_for(msgspec.json.decode(task, type=TaskConfig), model, seed)
    except HoslError as error:
        return str(error)
