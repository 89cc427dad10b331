"""One run of `hosl train` from start to end: setup, training, one evaluation on test, export and report."""

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from hosl.config import Config, dump_config
from hosl.errors import ConfigError, FolderError
from hosl.report.build import write_report
from hosl.report.planned import planned_lines
from hosl.split import export_adapter, export_checkpoint
from hosl.split.adapters import lora_layers
from hosl.system.checkpoint import newest_checkpoint
from hosl.system.machine import machine, process_bytes, versions
from hosl.system.readable import readable_bytes
from hosl.system.run_folder import RunLock, new_folder
from hosl.tasks import label_note, model_labels
from hosl.training.learning_rate_sweep import with_rate
from hosl.training.local_session import LocalSession, load_run, new_session
from hosl.training.loop import carry_on
from hosl.training.trackers import check_trackers, feed_trackers

_HOSL_TRAIN = "hosl train --resume {run}"


def start(config: Config) -> dict[str, Any]:
    """Train from the beginning in a new folder; returns the run's summary.

    The folder is `config.output_dir`, or the same name with -2, -3, ... if that is taken.

    Raises:
        RequestError: if a setting, the model or the data cannot be used; no folder is made.
        FailureError: if the training fails.
    """
    check_trackers(config)
    before_bytes = process_bytes()
    config, swept = with_rate(config, _say)
    session = new_session(config)  # before a folder is made: it may refuse the config
    for note in session.facts["notes"]:
        _say(f"model {config.model.name}: {note}")
    if session.task.head == "classification" and (
        note := label_note(session.task.labels, model_labels(session.tokenizer_folder))
    ):
        _say(note)
    run = new_folder(Path(config.output_dir))
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    record = {
        "versions": versions(), "machine": machine() | {"threads": torch.get_num_threads()},
        "process_base_bytes": before_bytes, **session.facts,
    }  # fmt: skip
    if swept is not None:
        record["sweep"] = swept.facts()
    (run / "record.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    with RunLock(run):
        return carry_on(session, run, _HOSL_TRAIN, _finish, metrics_bytes=0)


def resume(run: Path) -> dict[str, Any]:
    """Go on from the newest checkpoint of a run's folder; returns the run's summary.

    Raises:
        FolderError: if `run` is not a run's folder, or another process uses it.
        CheckpointError: if the checkpoint belongs to other weights or data, or is damaged.
        FailureError: if the training fails.
    """
    if not (run / "config.yaml").is_file():
        raise FolderError(
            f"{run} is not a run's folder: it has no config.yaml; give the folder that `hosl train` made"
        )
    with RunLock(run):
        session = load_run(run)
        path = newest_checkpoint(run / "checkpoints")
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))["facts"] if path else {}
        return carry_on(session, run, _HOSL_TRAIN, _finish, metrics_bytes=facts.get("metrics_bytes", 0))


def export(run: Path, out: Path, *, tie: Literal["embedding", "head"] | None = None) -> None:
    """Write a run's newest weights as one Hugging Face checkpoint; adapters also as `out`/adapter.

    If client.dtype made the base low-precision, adapters are merged into the original weights, as users of peft do.

    Args:
        run: the run's folder.
        out: a folder to make.
        tie: the copy that stands for both where head and embeddings were one tensor; None: they are two if they differ.

    Raises:
        FolderError: if `run` is not a run's folder, or `out` is taken.
        ConfigError: if `tie` is asked of a model that is not tied.
    """
    _export_session(load_run(run, low_precision=False), out, tie)


def _export_session(
    session: LocalSession, out: Path, tie: Literal["embedding", "head"] | None = None
) -> None:
    """Merge both halves into one checkpoint that plain transformers loads; adapters also on their own."""
    labels = session.task.labels if session.task.head == "classification" else None
    grown_bytes = export_checkpoint(
        session.client_half, session.server_half, out, folder=session.tokenizer_folder, labels=labels, tie=tie
    )
    if grown_bytes:
        _say(
            f"head and embeddings were one tensor and differ now: {out} is {readable_bytes(grown_bytes)} larger than "
            "the model; `hosl export --tie embedding` or `--tie head` keeps one of the two"
        )
    if not (lora_layers(session.client_half) or lora_layers(session.server_half)):
        return
    name = session.config.model.name
    from_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).is_dir()
    base = name if from_hub else str(session.tokenizer_folder.resolve())
    try:
        export_adapter(session.client_half, session.server_half, out / "adapter", base=base)
    except ConfigError as reason:
        _say(f"no adapter beside the model: {reason}")


def _say(text: str) -> None:
    sys.stderr.write(f"hosl: {text}\n")


def _finish(session: LocalSession, run: Path) -> None:
    if not (run / "model").exists():
        if session.config.client.dtype == "model":
            _export_session(session, run / "model")
        else:
            export(run, run / "model")  # the session no longer has the original weights
    write_report(run, planner=planned_lines)
    feed_trackers(session.config, run)
