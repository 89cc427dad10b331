"""The steps of a run, one after the other: draw a batch, run the round, write down, evaluate, save."""

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from hosl.checkpoint import write_checkpoint
from hosl.evaluation import evaluate
from hosl.parties.metered import Meter, Metered, resident_bytes
from hosl.parties.torch_client import FirstOrderClient
from hosl.parties.torch_server import FirstOrderServer
from hosl.run.progress import View
from hosl.run.record import Record, process_peak_bytes
from hosl.run.schedule import batch_indices, learning_rate
from hosl.run.session import Session, session_checkpoint
from hosl.run.stopping import Stop

_MEMORY_STEPS = 50
"""Memory is measured in the first two steps of a process and every so many after; it slows those steps."""


@dataclass
class Meters:
    """One meter per party."""

    client: Meter
    server: Meter


def train(session: Session, record: Record, run: Path, view: View, stop: Stop) -> None:
    """Run the steps that are left, until the last one or until `stop` is asked for; ends with a checkpoint."""
    config, first = session.config, session.step + 1
    meters = Meters(Meter(), Meter())
    client, server = Metered(session.client, meters.client), Metered(session.server, meters.server)
    shown: dict[str, str] = {}
    for step in range(first, config.max_steps + 1):
        begin = perf_counter()
        measured = step < first + 2 or step % _MEMORY_STEPS == 0
        _measure_memory(session, meters, on=measured)
        indices = batch_indices(
            config.seed, step, config.per_device_train_batch_size, len(session.task.train)
        )
        batch = session.task.collate([session.task.train[i] for i in indices])
        result = session.round(client, server, batch, step)
        _measure_memory(session, meters, on=False)
        session.step = step
        seconds = perf_counter() - begin
        _write_step(session, record, meters, step, seconds, result)
        shown |= {"loss": f"{result.loss:.4f}", "s/step": f"{seconds:.2f}"}
        shown["client"] = f"{meters.client.peak_bytes / 2**20:.0f} MiB"
        last = step == config.max_steps
        if step % config.eval_steps == 0 or last:
            shown["dev"] = f"{_evaluate_dev(session, record, step):.3f}"
        if step % config.save_steps == 0 or last or stop.asked:
            save(session, record, run)
        view.step(step, shown)
        if stop.asked:
            return


def save(session: Session, record: Record, run: Path) -> None:
    """A checkpoint of both halves at the session's step."""
    metrics_bytes = record.flush()
    write_checkpoint(run / "checkpoints", session_checkpoint(session, {"metrics_bytes": metrics_bytes}))


def _write_step(
    session: Session, record: Record, meters: Meters, step: int, seconds: float, result: Any
) -> None:
    client, server = meters.client.take(), meters.server.take()
    record.metrics(
        step=step,
        loss_nats=result.loss,
        coefficients=list(result.coefficients),
        client_learning_rate=learning_rate(session.config, session.config.client.learning_rate)(step),
        server_learning_rate=session.server.learning_rate(step),
        bytes_up=server.bytes_in,
        bytes_down=server.bytes_out,
    )
    record.timings(
        step=step,
        step_s=round(seconds, 6),
        client_s=round(client.seconds, 6),
        server_s=round(server.seconds, 6),
        client_peak_bytes=client.peak_bytes,
        server_peak_bytes=server.peak_bytes,
        process_peak_bytes=process_peak_bytes(),
    )


def _evaluate_dev(session: Session, record: Record, step: int) -> float:
    dev = evaluate(
        session.client, session.server, session.task, session.task.dev,
        rows_per_batch=session.config.per_device_eval_batch_size,
    )  # fmt: skip
    record.metrics(step=step, split="dev", **asdict(dev))
    return dev.accuracy


def _measure_memory(session: Session, meters: Meters, *, on: bool) -> None:
    if not on:
        meters.client.stop_measuring()
        meters.server.stop_measuring()
        return
    meters.client.start_measuring(resident_bytes(_resident(session.client)))
    meters.server.start_measuring(resident_bytes(_resident(session.server)))


def _resident(party: Any) -> list[torch.Tensor]:
    tensors = [*party.half.model.parameters(), *party.half.model.buffers()]
    if isinstance(party, FirstOrderClient | FirstOrderServer):
        for state in party.optimiser.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return tensors
