"""The steps of a run, one after the other: draw a batch, run the round, record, evaluate, save. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from hosl.core.rounds import RoundResult
from hosl.errors import BusyError, LinkError, OverBudgetError, SessionError, StepMoved
from hosl.evaluation import Evaluation, evaluate
from hosl.methods.schedule import batch_of_step, learning_rate
from hosl.system.checkpoint import checkpoint_steps
from hosl.system.interrupts import Stop
from hosl.system.machine import process_peak_bytes
from hosl.system.progress import View, open_view
from hosl.system.run_folder import MEMORY_STEPS, Record, read_lines
from hosl.tasks import Example
from hosl.training.memory_budget import over_budget
from hosl.training.session import Session
from hosl.training.summary import farewell, greeting, run_summary

_RETURNS = 20
"""The times in a row that the server may go back before a new step is reached."""


def carry_on(
    session: Any,
    run: Path,
    resume_command: str,
    finish: Callable[[Any, Path], None],
    *,
    metrics_bytes: int | None,
) -> dict[str, Any]:
    """Run the steps that are left, evaluate once on test and call `finish`; returns the run's summary.

    Args:
        session: a `Session` at the step to go on from.
        run: the run's folder.
        resume_command: the command that resumes the run after an interruption; `{run}` is filled in.
        finish: is called with the finished session and its folder: export, report, trackers.
        metrics_bytes: the bytes of metrics.jsonl that belong to the steps done; None: every line up to the last step.

    Raises:
        FailureError: if the training fails, or the client exceeds its memory budget.
    """
    config = session.config
    record = Record(run, metrics_bytes=metrics_bytes, step=session.step)
    try:
        with (
            Stop() as stop,
            open_view(f"{config.method} {run}", session.step, config.max_steps) as view,
        ):
            for line in (*session.task.notes, greeting(session, run)):
                view.say(line)
            session.stop_when(lambda: stop.requested)
            if record.lost:
                view.say(f"{run}/metrics.jsonl was damaged: lines up to step {session.step} are missing")
            if config.save_best and session.best is None:  # a checkpoint of version 0.2 does not tell
                session.best = _best_of_lines(session, record, run, view)
            train(session, record, run, view, stop)
            if session.step < config.max_steps:
                view.say(f"stopped after step {session.step}; go on with: {resume_command.format(run=run)}")
                return run_summary(session, run, finished=False)
            if not _has_dev_line(record, run, session.step):  # other clients made the last steps
                _evaluate(session, record, session.step, "dev")
                if session.step not in checkpoint_steps(run / "checkpoints"):
                    save(session, record, run)
            _evaluate_test(session, record)
            session.finish()
            finish(session, run)
            summary = run_summary(session, run, finished=True)
            view.say(farewell(summary, run))
            return summary
    except StepMoved as moved:
        raise SessionError(
            f"the server went to step {moved.step} after the last one, {session.step}; go on with: "
            f"{resume_command.format(run=run)}"
        ) from moved
    finally:
        record.close()


def train(session: Session, record: Record, run: Path, view: View, stop: Stop) -> None:
    """Run the steps that are left, until the last one or until a stop is requested; end with a checkpoint.

    If the server is at another step, the client goes to that step, and the record is cut back with it.
    """
    first, shown, furthest, returns = session.step + 1, dict[str, str](), session.step, 0
    while session.step < session.config.max_steps and not stop.requested:
        try:
            _one_step(session, record, run, first, shown, stop)
        except (LinkError, BusyError) as away:
            if not stop.requested:
                raise
            view.say(f"{away}; what came after the newest checkpoint will be done again")
        except StepMoved as moved:
            before = session.step
            furthest, returns = (before, 0) if before > furthest else (furthest, returns + 1)
            if moved.step <= before and returns > _RETURNS:
                raise SessionError(
                    f"the server went back {returns} times, now to step {moved.step}, and no step after {furthest} was "
                    "reached; ask its owner, then go on"
                ) from moved
            facts = session.go_to(run, moved.step)
            if facts is not None:
                record.cut_back(facts.get("metrics_bytes", 0), session.step)
            view.say(f"the server is at step {moved.step}, this client was at {before}: going on from there")
        view.step(session.step, shown)


def save(session: Session, record: Record, run: Path) -> None:
    """Write a checkpoint at the session's step."""
    best = {} if session.best is None else {"best": list(session.best)}
    session.save(run, {"metrics_bytes": record.flush(), **session.control.state(), **best})


def _one_step(
    session: Session, record: Record, run: Path, first: int, shown: dict[str, str], stop: Stop
) -> None:
    config, step, begin = session.config, session.step + 1, perf_counter()
    session.count_anew()  # an evaluation's costs, or a broken-off step's, belong to no step
    session.measure_memory(on=step < first + 2 or step % MEMORY_STEPS == 0)
    result = session.round(batch_of_step(config, session.task, step), step)
    session.measure_memory(on=False)
    session.done(step)
    seconds = perf_counter() - begin
    _write_step(session, record, step, seconds, result)
    shown |= {"loss": f"{result.loss:.4f}", "s/step": f"{seconds:.2f}"}
    shown["client"] = f"{session.meters.client.peak_bytes / 2**20:.0f} MiB"
    last = step == config.max_steps
    if step % config.eval_steps == 0 or last:
        dev = _evaluate(session, record, step, "dev")
        shown["dev"] = f"{dev.accuracy:.3f}" if session.task.labels else f"{dev.loss_nats:.4f}"
        found = _rank(session, dev.accuracy, dev.loss_nats)
        if config.save_best and (session.best is None or found > session.best):
            session.best = found
            session.save_best(run)
    over = over_budget(session)
    if step % config.save_steps == 0 or last or stop.requested or over:
        save(session, record, run)
    if over:
        raise OverBudgetError(over)


def _write_step(session: Session, record: Record, step: int, seconds: float, result: RoundResult) -> None:
    config, client, server = session.config, session.meters.client.take(), session.meters.server.take()
    record.metrics(
        step=step,
        loss_nats=result.loss,
        coefficients=list(result.coefficients),
        client_learning_rate=learning_rate(config, config.client_rate)(step),
        server_learning_rate=learning_rate(config, config.server_rate)(step),
        bytes_up=server.bytes_in,
        bytes_down=server.bytes_out,
        **_probes(result),
        **session.notes(),
    )
    record.timings(
        step=step,
        step_s=round(seconds, 6),
        client_s=round(client.seconds, 6),
        server_s=round(server.seconds, 6),
        client_static_bytes=client.static_bytes,
        server_static_bytes=server.static_bytes,
        client_peak_bytes=client.peak_bytes,
        server_peak_bytes=server.peak_bytes,
        process_peak_bytes=process_peak_bytes(),
        client_calls_s=_rounded(client.by_call),
        server_calls_s=_rounded(server.by_call),
        **session.costs(),
    )


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {call: round(of_call, 6) for call, of_call in seconds.items()}


def _probes(result: RoundResult) -> dict[str, float | int]:
    if not result.coefficients:
        return {}
    noise = {} if result.noise is None else {"probe_noise": result.noise}
    return {"rejected_probes": result.rejected, "probe_signal": result.signal} | noise


def _has_dev_line(record: Record, run: Path, step: int) -> bool:
    record.flush()
    lines = read_lines(run / "metrics.jsonl")
    return any(line.get("split") == "dev" and line["step"] == step for line in lines)


def _best_of_lines(session: Session, record: Record, run: Path, view: View) -> tuple[float, float] | None:
    record.flush()
    lines = [line for line in read_lines(run / "metrics.jsonl") if line.get("split") == "dev"]
    if record.lost or (not lines and session.step >= session.config.eval_steps):
        view.say(
            f"save_best: evaluations up to step {session.step} are not known; the best one after them may be kept"
        )
    return max((_rank(session, line["accuracy"], line["loss_nats"]) for line in lines), default=None)


def _rank(session: Session, accuracy: float, loss_nats: float) -> tuple[float, float]:
    """What is more for a better evaluation: by accuracy, then loss; of texts by loss, then tokens right."""
    return (accuracy, -loss_nats) if session.task.labels else (-loss_nats, accuracy)


def _evaluate_test(session: Session, record: Record) -> None:
    """Score the test part, and keep it in a file of its own, too: lines may be lost."""
    test = _evaluate(session, record, session.step, "test")
    record.flush()
    classes = {} if test.confusion is None else {"confusion": test.confusion.tolist()}
    record.evaluation(
        step=session.step, split="test", **test.numbers(), labels=session.task.labels, **classes
    )


def _evaluate(session: Session, record: Record, step: int, split: Literal["dev", "test"]) -> Evaluation:
    """Score a part of the data; its bytes are counted by themselves, and what a wire took is a line of timings."""
    examples: Sequence[Example] = getattr(session.task, split)
    session.count_anew()
    found = evaluate(
        session.client, session.server_to_call(in_round=False), session.task, examples,
        rows_per_batch=session.config.per_device_eval_batch_size,
    )  # fmt: skip
    server, wire = session.meters.server.take(), session.costs()
    record.metrics(
        step=step,
        split=split,
        **found.numbers(),
        eval_bytes_up=server.bytes_in,
        eval_bytes_down=server.bytes_out,
    )
    if wire:
        record.timings(step=step, split=split, server_s=round(server.seconds, 6), **wire)
    return found
