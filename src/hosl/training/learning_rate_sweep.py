"""`client.learning_rate: auto`: a short sweep before the run, on halves of its own; the run starts from its own halves.

Each rate gets the same fresh halves and the same few steps; then the loss is measured on training rows that no step
used. Rate 0, a client that stays as it is, is tried too: a gain over it counts if it exceeds two standard errors, and
the largest such gain decides. If no gain counts, the largest rate without harm is taken.

Each try is written to a file beside the run as soon as it is known, so that a sweep that was killed goes on.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from msgspec.structs import replace

from hosl.config import Config, dump_config
from hosl.core.targets import Batch
from hosl.errors import FailureError, NonFiniteError
from hosl.methods.schedule import batch_indices
from hosl.system.atomic import whole_file
from hosl.system.machine import versions
from hosl.system.run_folder import writable_place
from hosl.training.local_session import LocalSession, new_session

STEPS = 20
"""Steps at each rate."""
HELD_OUT_BATCHES = 8
_STANDARD_ERRORS = 2.0
"""The standard errors by which a gain must exceed zero to count."""


@dataclass(frozen=True)
class Tried:
    """One rate of the sweep and its result."""

    rate: float
    held_out_loss_nats: float | None
    """The mean over the held-out batches; None: it diverged."""
    gain_nats: float | None
    """The loss of rate 0 less that of this rate, mean over the held-out batches; None: it diverged."""
    gain_standard_error: float | None
    """The standard error of the gain; None: it diverged, or there is only one held-out batch."""

    @property
    def gained(self) -> bool:
        """Whether the gain counts."""
        if self.gain_nats is None or self.gain_standard_error is None:
            return False
        return self.gain_nats > _STANDARD_ERRORS * self.gain_standard_error


@dataclass(frozen=True)
class Sweep:
    """The chosen rate, the reason, and all rates that were tried."""

    rate: float
    why: str
    tried: tuple[Tried, ...]
    file: Path
    """The file of the tries, which is needed until the run's record has them."""

    def facts(self) -> dict[str, Any]:
        """The sweep as the run's record holds it."""
        return {"client_learning_rate": self.rate, "why": self.why, "tried": [asdict(t) for t in self.tried]}


def with_rate(config: Config, say: Callable[[str], None]) -> tuple[Config, Sweep | None]:
    """The config with a number for both learning rates, and the sweep that chose the client's, if it was auto."""
    config = replace(config, server=replace(config.server, learning_rate=config.server_rate))
    if config.client.learning_rate != "auto":
        return config.with_client_rate(config.client_rate), None
    result = sweep(config, say)
    say(f"client.learning_rate: {result.rate:g}: {result.why}")
    return config.with_client_rate(result.rate), result


def sweep(config: Config, say: Callable[[str], None], *, steps: int = STEPS) -> Sweep:
    """Try the method's rates and choose one. Deterministic in the config.

    Tries of the same config, model, data and versions that a killed sweep left beside the run are taken as they are.

    Args:
        config: the settings of the run.
        say: is called with the name of the file of the tries, and a line for each rate: its loss, and the time left.
        steps: steps at each rate.

    Raises:
        RequestError: if the run could not be made: no rate is tried.
        NonFiniteError: if the run diverges even with a client that stays as it is.
        FailureError: if a try cannot be written.
    """
    rates = config.learning_rates.to_try_for(config.client.trainable)
    file = writable_place(Path(config.output_dir)) / f".sweep-{_digest(config, steps)}.json"
    kept = _kept(file)
    say(
        f"client.learning_rate: auto, {len(rates) + 1} tries, kept in {file}: after a kill, the same command goes on"
    )
    losses, begin = {}, time.perf_counter()
    for index, rate in enumerate((0.0, *rates)):
        known = rate in kept
        losses[rate] = kept[rate] if known else _held_out_losses(config, rate, steps)
        if not known:
            _keep(file, losses)
        made = index + 1 - len(kept)
        left_s = (time.perf_counter() - begin) / max(made, 1) * (len(rates) - index)
        shown = "diverged" if losses[rate] is None else f"held-out loss {mean(losses[rate]):.4f}"
        left = "kept from before" if known else f"{left_s:.0f} s left"
        say(f"client.learning_rate: auto, {rate:g} for {steps} steps: {shown}; {left}")
    unmoved = losses.pop(0.0)
    if unmoved is None:
        raise NonFiniteError(
            f"client.learning_rate: auto: the server diverged within {steps} steps though the client stayed as it is; "
            "lower server.learning_rate"
        )
    rate, why = _chosen(tried := [_tried(rate, of_rate, unmoved) for rate, of_rate in losses.items()], steps)
    return Sweep(rate, why, tuple(tried), file)


def _digest(config: Config, steps: int) -> str:
    """What the tries depend on, as 16 hexadecimal digits: the config, the content of model and data, the versions."""
    facts = new_session(_short(config, 0.0, steps)).facts
    whole = json.dumps([dump_config(config), facts, versions(), steps], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _kept(file: Path) -> dict[float, list[float] | None]:
    """The losses of each rate that was tried before; a damaged file has none."""
    try:
        return {float(rate): losses for rate, losses in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError):
        return {}


def _keep(file: Path, losses: dict[float, list[float] | None]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole_file(file, json.dumps(losses).encode())
    except OSError as cause:
        raise FailureError(
            f"{file} could not be written: {cause.strerror}; the tries before are kept: make room, and start again"
        ) from cause


def _chosen(tried: list[Tried], steps: int) -> tuple[float, str]:
    """The rate with the largest gain that counts, and why; if there is none, the largest rate that did no harm.

    Harm is any loss above that of rate 0: with a margin of its own standard error, the noisiest rate would pass.
    """
    best = max((t for t in tried if t.gained), key=lambda t: _number(t.gain_nats), default=None)
    if best is not None:
        gain = f"{best.gain_nats:.4f} ± {best.gain_standard_error:.4f} nats"
        why = f"the largest gain that is no noise, after {steps} steps {gain} below a client that stays as it is"
        return best.rate, why
    finite = [t for t in tried if t.gain_nats is not None]
    harmless = [t for t in finite if _number(t.gain_nats) >= 0]
    why = f"after {steps} steps no rate can be told to beat a client that stays as it is; "
    if harmless:
        why += "the largest that did no harm, a longer run may use it"
        return harmless[-1].rate, why
    why += "all tried raised the held-out loss: the smallest, look at the data"
    return (finite or tried)[0].rate, why


def _tried(rate: float, losses: list[float] | None, unmoved: list[float]) -> Tried:
    if losses is None:
        return Tried(rate, None, None, None)
    gains = [before - after for before, after in zip(unmoved, losses, strict=True)]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    return Tried(rate, mean(losses), mean(gains), error)


def _held_out_losses(config: Config, rate: float, steps: int) -> list[float] | None:
    """The loss of each held-out batch after the steps at this rate, nats; None: they diverged."""
    session = new_session(_short(config, rate, steps))
    seen, held_out = _batches(session, steps)
    try:
        for step, batch in enumerate(seen, start=1):
            session.round(batch, step)
        server: Any = session.server_to_call(in_round=False)
        losses = [server.losses([session.client.forward(b)], b.targets)[0] for b in held_out]
    except NonFiniteError:
        return None
    return losses if all(map(math.isfinite, losses)) else None


def _short(config: Config, rate: float, steps: int) -> Config:
    return replace(
        config.with_client_rate(rate),
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=steps,
        num_train_epochs=None,
    )


def _batches(session: LocalSession, steps: int) -> tuple[list[Batch], list[Batch]]:
    """The batches of the steps, and held-out batches of other rows.

    Where rows are few, held-out batches get smaller and not fewer: the standard error needs several of them.
    """
    config, task = session.config, session.task
    size, rows = config.per_device_train_batch_size, len(task.train)
    order = batch_indices(config.seed, 1, rows, rows)
    held = max(min(HELD_OUT_BATCHES * size, rows // 5), 1)
    trained, kept = order[:-held] or order, order[-held:]
    batches = min(HELD_OUT_BATCHES, held)
    ends = [held * number // batches for number in range(batches + 1)]

    def batch(indices: list[int]) -> Batch:
        return task.collate([task.train[i] for i in indices])

    return (
        [batch([trained[(step * size + i) % len(trained)] for i in range(size)]) for step in range(steps)],
        [batch(kept[start:end]) for start, end in pairwise(ends)],
    )


def _number(value: float | None) -> float:
    assert value is not None, "of a rate that did not diverge"
    return value
