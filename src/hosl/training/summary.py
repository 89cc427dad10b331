"""A run in few words: the summary that a command prints, and the lines at the start and the end. No torch."""

from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.system.checkpoint import checkpoint_steps
from hosl.system.run_folder import TIMINGS, read_evaluation, read_lines, read_record
from hosl.training.session import Session


def run_summary(session: Session, run: Path, *, finished: bool) -> dict[str, Any]:
    """The summary of a run: its files' and the steps of the session."""
    digest = session.facts.get("final_client_digest")
    own = {"steps": session.step} | ({} if digest is None else {"client_digest": digest})
    if "journal_updates" in session.facts:
        own["journal_updates"] = session.facts["journal_updates"]
    return files_summary(session.config, run, finished=finished) | own


def files_summary(config: Config, run: Path, *, finished: bool) -> dict[str, Any]:
    """The summary of a run from its files: losses, accuracies, seconds, peaks, bytes of a step and of evaluations."""
    metrics, timings = (
        read_lines(run / name) if (run / name).is_file() else [] for name in ("metrics.jsonl", TIMINGS)
    )
    if finished and not any(line.get("split") == "test" for line in metrics):  # its line was lost
        metrics += [test for test in (read_evaluation(run) or {},) if "accuracy" in test]
    timings = [line for line in timings if "split" not in line]
    steps = [line for line in metrics if "split" not in line]
    summary: dict[str, Any] = {
        "run": str(run), "finished": finished, "method": config.method,
        "steps": max([*checkpoint_steps(run / "checkpoints")[-1:], *(line["step"] for line in steps)], default=0),
        "train_loss_nats": steps[-1]["loss_nats"] if steps else None,
    }  # fmt: skip
    if "client_digest" in (record := read_record(run) or {}):
        summary["client_digest"] = record["client_digest"]
    for line in metrics:
        if "split" in line:
            summary[f"{line['split']}_accuracy"] = line["accuracy"]
            for key in ("f1_macro", "loss_nats", "perplexity"):
                if key in line:
                    summary[f"{line['split']}_{key}"] = line[key]
    if timings:
        summary["median_step_s"] = sorted(line["step_s"] for line in timings)[len(timings) // 2]
        for key in ("client_peak_bytes", "server_peak_bytes", "process_peak_bytes"):
            summary[key] = max(line.get(key, 0) for line in timings)
    if steps:
        summary["bytes_up_per_step"] = sum(line["bytes_up"] for line in steps) // len(steps)
        summary["bytes_down_per_step"] = sum(line["bytes_down"] for line in steps) // len(steps)
    for key in ("eval_bytes_up", "eval_bytes_down"):
        summary[key] = sum(line.get(key, 0) for line in metrics if "split" in line)
    return summary


def greeting(session: Session, run: Path) -> str:
    """The lines before the first step: method, task, model, trained parameters, folder, what crosses or is not read."""
    task, facts, config = session.task, session.facts, session.config
    trained = ", ".join(f"{side} {count:,}" for side, count in facts["trained_parameters"].items())
    return (
        f"{config.method} on {task.name}: {len(task.train)} train, {len(task.dev)} dev, {len(task.test)} "
        f"test examples; {facts['model']['family']} cut at {facts['cut']}; trained: {trained} parameters; {run}\n"
        f"{facts['crosses']}{_unread(config)}"
    )


def _unread(config: Config) -> str:
    """The line for a server that is probed: its optimiser is none of those that the config can name."""
    if config.method_row.server == "first-order":
        return ""
    named = config.server.optimiser.name
    return (
        f"\nthe server is probed, too: plain SGD at server.learning_rate {config.server_rate:g}; server.optimiser "
        f"({named}) is not read"
    )


def farewell(summary: dict[str, Any], run: Path) -> str:
    """The line after the last step: accuracies, or losses of texts, and the files to look at."""
    updates = summary.get("journal_updates")
    shared = "" if updates is None else f"; this half has {updates} updates of the shared journal"
    model = f", {run}/model loads in transformers" if (run / "model").is_dir() else ""
    if "test_f1_macro" in summary:
        reached = (
            f"test accuracy {summary['test_accuracy']:.4f}, macro F1 {summary['test_f1_macro']:.4f} (dev accuracy "
            f"{summary['dev_accuracy']:.4f})"
        )
    else:
        reached = (
            f"test loss {summary['test_loss_nats']:.4f} nats, perplexity {summary['test_perplexity']:.4g}, "
            f"{summary['test_accuracy']:.2%} of tokens right (dev loss {summary['dev_loss_nats']:.4f})"
        )
    page = f"{run}/report.html shows the run" if (run / "report.html").is_file() else f"{run} holds the run"
    return f"done: {reached}; {page}{model}{shared}"
