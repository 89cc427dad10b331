"""One run of `hosl train` from start to end: setup, training, one evaluation on test, export and report."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from hosl.config import Config, dump_config, with_absolute_paths
from hosl.report.build import write_report
from hosl.report.planned import planned_lines
from hosl.split import ClientHalf, ServerHalf, resolve_model_folder
from hosl.split.export import export_model
from hosl.split.reading.model_folder import adapter_base
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import drop_checkpoints_after, keep_newest
from hosl.system.machine import machine, process_bytes, versions
from hosl.system.run_folder import RunLock, new_folder, read_record, writable_place, write_record
from hosl.tasks import own_chat_template
from hosl.training.learning_rate_sweep import with_rate
from hosl.training.local_session import LocalSession, load_halves, load_run, new_session, run_config, say
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
    config = with_absolute_paths(config)
    before_bytes = process_bytes()
    writable_place(Path(config.output_dir))  # refused now, not after the data and the model were read
    config, swept = with_rate(config, say)
    session = new_session(config)  # before a folder is made: it may refuse the config
    for note in session.facts["notes"]:
        say(f"model {config.model.name}: {note}")
    config = session.config  # with its steps counted
    run = new_folder(Path(config.output_dir), dump_config(config), say)
    with RunLock(run):
        swept_facts = {} if swept is None else {"sweep": swept.facts()}
        write_record(run, _record(session) | {"process_base_bytes": before_bytes} | swept_facts)
        if swept is not None:
            swept.file.unlink(missing_ok=True)
        return carry_on(session, run, _HOSL_TRAIN, _finish, metrics_bytes=0)


def resume(run: Path, *, max_steps: int | None = None) -> dict[str, Any]:
    """Go on from the newest intact checkpoint of a run's folder; returns the run's summary.

    Args:
        run: the run's folder.
        max_steps: the steps of the run from now on, so that a finished one is trained further; None: as before.

    Raises:
        ConfigError: if the run has made more steps than that.
        FolderError: if `run` is not a run's folder, or another process uses it.
        CheckpointError: if the checkpoint belongs to other weights or data, or all are damaged.
        FailureError: if the training fails.
    """
    before = run_config(run)  # ahead of the lock, which is a file
    with RunLock(run):
        session = load_run(run, max_steps=max_steps)
        if session.config != before:
            _prolong(run, session.config)
        if read_record(run) is None:
            say(f"{run}/record.json was damaged; it is written anew, for this process")
            write_record(run, _record(session))
        drop_checkpoints_after(run / "checkpoints", session.step)  # the damaged ones
        return carry_on(session, run, _HOSL_TRAIN, _finish, metrics_bytes=session.metrics_bytes)


def _prolong(run: Path, config: Config) -> None:
    """Write the config of a run that now has other steps; its time stays that of the run's beginning."""
    file = run / "config.yaml"
    begun = file.stat()
    whole_file(file, dump_config(config).encode())
    os.utime(file, ns=(begun.st_atime_ns, begun.st_mtime_ns))
    if config.lr_scheduler_type != "constant":
        say(f"lr_scheduler_type: {config.lr_scheduler_type} ends at step {config.max_steps} from now on")


def _record(session: LocalSession) -> dict[str, Any]:
    """The facts of record.json: where the run is made, and of what."""
    return {
        "versions": versions(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "config": msgspec.to_builtins(session.config),
        **session.facts,
    }


def export(
    run: Path, out: Path, *, best: bool = False, tie: Literal["embedding", "head"] | None = None
) -> None:
    """Write a run's newest weights, or its `best`, as one Hugging Face checkpoint; adapters also as `out`/adapter.

    If client.dtype made the base low-precision, adapters are merged into the original weights, as users of peft do.

    Args:
        run: the run's folder.
        out: a folder to make.
        best: whether to take the weights of the best evaluation on dev (`save_best`).
        tie: the copy that stands for both where head and embeddings were one tensor; None: they are two if they differ.

    Raises:
        FolderError: if `run` is not a run's folder, or `out` is taken.
        ConfigError: if `tie` is asked of a model that is not tied.
    """
    _export(*load_halves(run, best=best), out, tie)


def _export(
    config: Config,
    client: ClientHalf,
    server: ServerHalf,
    labels: Sequence[str] | None,
    out: Path,
    tie: Literal["embedding", "head"] | None = None,
) -> None:
    """Merge both halves into one checkpoint that plain transformers loads; adapters also on their own."""
    folder, name = resolve_model_folder(config.model.name), config.model.name
    export_model(
        client, server, out, folder=folder, base=adapter_base(name, folder), say=say, labels=labels, tie=tie,
        chat_template=own_chat_template(config.task),
    )  # fmt: skip


def _finish(session: LocalSession, run: Path) -> None:
    if session.config.save_model:
        shutil.rmtree(run / "model", ignore_errors=True)  # that of fewer steps
        if session.config.client.dtype == "model":
            labels = session.class_labels
            _export(session.config, session.client_half, session.server_half, labels, run / "model")
        else:
            export(run, run / "model")  # the session no longer has the original weights
    keep_newest(run / "checkpoints", 1)
    write_report(run, planner=planned_lines)
    feed_trackers(session.config, run)
