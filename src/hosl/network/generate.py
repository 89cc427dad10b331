"""Generation across the split: this device's half and tokenizer here, the rest of the model with a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hosl.config import Config, load_config
from hosl.core.journal import Journal
from hosl.errors import ConfigError, FolderError
from hosl.inference.remote import SplitModel
from hosl.network.handshake import model_message
from hosl.network.runtime import RuntimeName, open_runtime
from hosl.split.reading.half_json import half_facts
from hosl.system.allocator import return_freed_memory
from hosl.system.checkpoint import Checkpoint, checkpoint_path, intact_steps, read_checkpoint
from hosl.system.machine import versions
from hosl.system.model_limits import model_limits
from hosl.system.run_folder import read_record
from hosl.tasks import own_chat_template
from hosl.transport.channel import Patience, Proof, connect
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from hosl.wire.protocol import PROTOCOL


@dataclass(frozen=True, kw_only=True)
class SplitUse:
    """The arguments of a command that uses a model across the split."""

    path: Path
    """The folder of a client half, or of a run that `hosl join` made."""
    line: JoinLine
    proof: Proof = field(default_factory=Proof)
    run: str = ""
    """The run on the server; empty: that of `path`, or the newest one."""
    base: bool = False
    """Whether both halves are as they were split."""
    runtime: RuntimeName | None = None
    """The runtime of this device's half; None: see `open_runtime`."""


@dataclass(frozen=True)
class ReadySplitModel:
    """A model across the split that can go on with texts."""

    model: SplitModel
    folder: Path
    """The folder of its tokenizer: that of the client half."""
    says: str
    """What it is, for a person."""
    chat_template: Path | None = None
    """The chat template that the run was tuned with, where it is not the model's own."""


@contextmanager
def split_model_for_use(use: SplitUse, say: Callable[[str], None]) -> Iterator[ReadySplitModel]:
    """The model of a client half and a server, connected for as long as the context.

    Args:
        use: the half and the way to the server.
        say: is called once with what the server says of its half.

    Raises:
        FolderError: if `use.path` is neither a client half nor a run of `hosl join`.
        ConfigError: if the half belongs to a classifier.
        CheckpointError: if the run's checkpoints are damaged.
        LinkError, AccessError: if the server cannot be reached or trusted.
    """
    return_freed_memory()
    config, folder, run = joined_place(use.path)
    facts = half_facts(folder, "client")
    if facts["head"] != "causal":
        raise ConfigError(f"{use.path} is the half of a classifier: it has no text to say")
    check_not_blurred(config, use.path)
    record = {} if config is None else read_record(use.path) or {}
    runtime = open_runtime(use.runtime, folder, record)
    checkpoint = None if config is None or use.base else newest_here(use.path, runtime)
    if config is not None:
        runtime.check_device(config.client.device, "client.device")
    if remark := runtime.remark(folder):
        say(remark)
    half = runtime.open_text_half(None if use.base else config, folder, checkpoint)
    wire = (config or Config()).wire
    patience = Patience(connect_s=wire.connect_s, idle_s=wire.idle_s)
    channel = connect(use.line, patience=patience, proof=use.proof, known=False, say=say)

    @cache  # every text says it again
    def say_once(text: str) -> None:
        say(text)

    def hear(ready: pb.GenerateReady, last_step: int) -> None:
        of_run = f"run {ready.run} after step {ready.step}" if ready.run else "as it was split"
        if last_step == ready.step:
            more, warning = _fit(config, checkpoint, ready) if ready.run else ("", "")
            say_once(f"the server's half: {of_run}{more}")
            if warning:
                say_once(warning)
        else:
            say(f"the server's half was trained to step {last_step} meanwhile")

    ask = pb.AskGenerate(
        protocol=PROTOCOL, model=model_message(facts, config or Config()), run="" if use.base else use.run or run,
        base=use.base, version=versions()["hosl"],
    )  # fmt: skip
    says = "as it was split" if checkpoint is None else f"{use.path} after step {checkpoint.step}"
    vocabulary = model_limits(folder).vocabulary
    try:
        yield ReadySplitModel(
            SplitModel(channel, half, ask, vocabulary=vocabulary, hear=hear), folder, f"this half: {says}",
            None if config is None else own_chat_template(config.task),
        )  # fmt: skip
    finally:
        channel.close()


def check_not_blurred(config: Config | None, path: Path) -> None:
    """Refuse prompts of a config whose activations are blurred, as those of prompts would not be.

    Raises:
        ConfigError: if it has wire.clip_norm.
    """
    if config is not None and config.wire.clip_norm is not None:
        raise ConfigError(
            f"{path} was trained with wire.clip_norm, which is not there for prompts: they would go up as they are; "
            "let `hosl merge` put the model together and use it here"
        )


def _fit(config: Config | None, checkpoint: Checkpoint | None, ready: pb.GenerateReady) -> tuple[str, str]:
    """What is to be added to the server's step, and why its half of a run and this one are no model, if so."""
    if config is None or checkpoint is None:  # the server may name a run that was not asked for
        return "", (
            f"this half is as it was split: if run {ready.run} trained its device's half, these two were never one "
            "model; name the run's folder in place of this half"
        )
    clients = config.clients
    if clients.halves == "shared":
        has = Journal.from_bytes(checkpoint.journal or b"").last_step
        if has == ready.step:
            return ", all of whose updates this half has", ""
        return "", (
            f"this half has {has} of the {ready.step} updates of run {ready.run} (clients.halves: shared): these two "
            "were never one model; `hosl merge` takes the server's journal and writes the one that there is"
        )
    if not clients.alone:  # each device counts its own
        return f", of {clients.count} devices", ""
    if checkpoint.step == ready.step:
        return "", ""
    return "", (
        f"this half is after step {checkpoint.step}, the server's after step {ready.step}: these two were never one "
        "model; the run is under way, or was broken off: go on with it by `hosl join` to its end"
    )


def joined_place(path: Path) -> tuple[Config | None, Path, str]:
    """The settings of a run, the folder of its client half, and its name on the server; of a half: the folder alone."""
    if (path / "half.json").is_file():
        return None, path, ""
    record = read_record(path) or {}
    if "run_id" not in record:
        raise FolderError(
            f"{path} is neither a client half (OUT/client of `hosl split`) nor a run that `hosl join` made; of a "
            "run of `hosl train` both halves are here: leave --to out"
        )
    folder = Path(record.get("model", {}).get("source", path))
    if not (folder / "half.json").is_file():
        raise FolderError(
            f"{path} was made from the half in {folder}, which is not there any more; put it back"
        )
    return load_config(path / "config.yaml"), folder, record["run_id"]


def newest_here(run: Path, runtime: Any) -> Checkpoint | None:
    """The newest intact checkpoint of this device's part of a run, as the runtime reads it; None: there is none yet."""
    step = next(intact_steps(run / "checkpoints", lambda text: None), None)
    return (
        None
        if step is None
        else read_checkpoint(checkpoint_path(run / "checkpoints", step), arrays=runtime.ARRAYS)
    )
