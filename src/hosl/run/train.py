"""One run from start to end: setup -> train -> test once -> export and report. `hosl train` calls them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hosl.checkpoint import newest_checkpoint
from hosl.config import Config, dump_config
from hosl.errors import FolderError
from hosl.evaluation import Evaluation, evaluate
from hosl.run.loop import train
from hosl.run.progress import open_view
from hosl.run.record import Record, RunLock, read_lines, versions
from hosl.run.report import write_report
from hosl.run.session import Session, load_run, new_session
from hosl.run.stopping import Stop
from hosl.run.trackers import check_trackers, feed_trackers
from hosl.split import export_adapter, export_checkpoint


def start(config: Config) -> dict[str, Any]:
    """Train from the beginning in a new folder; returns the run's summary.

    The folder is `config.output_dir`, or, where that is taken, the same name with -2, -3, ...
    """
    check_trackers(config)
    session = new_session(config)  # what can be refused is refused before a folder is made
    run = _new_folder(Path(config.output_dir))
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    record = {"versions": versions(), **session.facts}
    (run / "record.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    with RunLock(run):
        return _carry_on(session, run, metrics_bytes=0)


def resume(run: Path) -> dict[str, Any]:
    """Go on from the newest checkpoint of a run's folder; returns the run's summary.

    Raises:
        FolderError: if `run` is not a run's folder, or another process is at work in it.
    """
    if not (run / "config.yaml").is_file():
        raise FolderError(
            f"{run} is not a run's folder: it has no config.yaml; give the folder that `hosl train` made"
        )
    with RunLock(run):
        session = load_run(run)
        path = newest_checkpoint(run / "checkpoints")
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))["facts"] if path else {}
        return _carry_on(session, run, metrics_bytes=facts.get("metrics_bytes", 0))


def test(session: Session) -> Evaluation:
    """Accuracy on the test split, at the weights at hand."""
    return evaluate(
        session.client, session.server, session.task, session.task.test,
        rows_per_batch=session.config.per_device_eval_batch_size,
    )  # fmt: skip


def export(run: Path, out: Path) -> None:
    """Write a run's newest weights as one Hugging Face checkpoint; adapters also as `out`/adapter.

    Raises:
        FolderError: if `run` is not a run's folder, or `out` is taken.
    """
    export_session(load_run(run), out)


def export_session(session: Session, out: Path) -> None:
    """Merge both halves into one checkpoint that plain transformers loads; adapters also on their own."""
    config = session.config
    labels = session.task.labels if session.task.head == "classification" else None
    export_checkpoint(
        session.client_half,
        session.server_half,
        out,
        tokenizer_folder=session.tokenizer_folder,
        labels=labels,
    )
    if "lora" in (config.client.trainable, config.server.trainable) and config.method != "frozen":
        export_adapter(session.client_half, session.server_half, out / "adapter")


def _carry_on(session: Session, run: Path, metrics_bytes: int) -> dict[str, Any]:
    config = session.config
    record = Record(run, metrics_bytes=metrics_bytes, step=session.step)
    title = f"{config.method} {run}"
    try:
        with Stop() as stop, open_view(title, session.step, config.max_steps) as view:
            view.say(_greeting(session, run))
            train(session, record, run, view, stop)
            if session.step < config.max_steps:
                view.say(f"stopped after step {session.step}; go on with: hosl train --resume {run}")
                return _summary(session, run, finished=False)
            _finish(session, record, run)
            summary = _summary(session, run, finished=True)
            view.say(_farewell(summary, run))
            return summary
    finally:
        record.close()


def _finish(session: Session, record: Record, run: Path) -> None:
    record.metrics(step=session.step, split="test", **asdict(test(session)))
    record.flush()
    if not (run / "model").exists():
        export_session(session, run / "model")
    write_report(run)
    feed_trackers(session.config, run)


def _summary(session: Session, run: Path, *, finished: bool) -> dict[str, Any]:
    metrics, timings = read_lines(run / "metrics.jsonl"), read_lines(run / "timings.jsonl")
    steps = [line for line in metrics if "split" not in line]
    summary: dict[str, Any] = {
        "run": str(run), "finished": finished, "method": session.config.method, "steps": session.step,
        "train_loss_nats": steps[-1]["loss_nats"] if steps else None,
    }  # fmt: skip
    for line in metrics:
        if "split" in line:
            summary[f"{line['split']}_accuracy"] = line["accuracy"]
            summary[f"{line['split']}_loss_nats"] = line["loss_nats"]
    if timings:
        middle = sorted(line["step_s"] for line in timings)[len(timings) // 2]
        summary["median_step_s"] = middle
        for key in ("client_peak_bytes", "server_peak_bytes", "process_peak_bytes"):
            summary[key] = max(line[key] for line in timings)
    if steps:
        summary["bytes_up_per_step"] = sum(line["bytes_up"] for line in steps) // len(steps)
        summary["bytes_down_per_step"] = sum(line["bytes_down"] for line in steps) // len(steps)
    return summary


def _greeting(session: Session, run: Path) -> str:
    task, facts = session.task, session.facts
    return (
        f"{session.config.method} on {task.name}: {len(task.train)} train, {len(task.dev)} dev, {len(task.test)} "
        f"test examples; {facts['model']['family']} cut at {facts['cut']}; trained: client "
        f"{facts['trained_parameters']['client']:,}, server {facts['trained_parameters']['server']:,} "
        f"parameters; {run}"
    )


def _farewell(summary: dict[str, Any], run: Path) -> str:
    return (
        f"done: test accuracy {summary['test_accuracy']:.4f} (dev {summary['dev_accuracy']:.4f}); "
        f"{run}/report.html shows the run, {run}/model loads in transformers"
    )


def _new_folder(wanted: Path) -> Path:
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as cause:
            raise FolderError(
                f"output_dir {folder} cannot be made: {cause.strerror}; choose a folder that can be written"
            ) from cause
        else:
            return folder
