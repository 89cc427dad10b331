"""`client.learning_rate: auto`: a short sweep before the run, on halves of its own; the run itself starts untouched.

Each rate gets the same fresh halves and the same few steps; then the loss is read on training rows that no step saw.
A rate of 0, a client that stays as it is, runs beside them: only what beats it by two standard errors is called
learning, and the largest such gain is taken. If nothing is, it is the largest rate that did no harm.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from msgspec.structs import replace

from hosl.config import Config
from hosl.core.targets import Batch
from hosl.errors import NonFiniteError
from hosl.methods.schedule import batch_indices
from hosl.training.local_session import LocalSession, new_session

STEPS = 20
HELD_OUT_BATCHES = 8
_STANDARD_ERRORS = 2.0
"""By which a gain must exceed zero to be called one."""

PROBED = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
"""Rates for slopes of random directions, whose length is that of all trained weights."""
DESCENDED = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Rates for gradients and their estimates, applied by SGD."""
ADAPTIVE = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""Rates for AdamW."""


@dataclass(frozen=True)
class Tried:
    """One rate of the sweep."""

    rate: float
    held_out_loss_nats: float | None
    """Mean over the held-out batches; None: it diverged."""
    gain_nats: float | None
    """How far below the loss of rate 0, mean of the batches' differences."""
    gain_standard_error: float | None
    """None: it diverged, or there is one held-out batch, whose gain nothing tells from noise."""

    @property
    def gained(self) -> bool:
        """Whether the gain can be told from none."""
        if self.gain_nats is None or self.gain_standard_error is None:
            return False
        return self.gain_nats > _STANDARD_ERRORS * self.gain_standard_error


@dataclass(frozen=True)
class Sweep:
    """What was chosen, why, and what else was tried."""

    rate: float
    why: str
    tried: tuple[Tried, ...]

    def facts(self) -> dict[str, Any]:
        """For the run's record."""
        return {"client_learning_rate": self.rate, "why": self.why, "tried": [asdict(t) for t in self.tried]}


def with_rate(config: Config, say: Callable[[str], None]) -> tuple[Config, Sweep | None]:
    """The config with a number for client.learning_rate, and the sweep that found it, if it was auto."""
    if config.client.learning_rate != "auto":
        return config.with_client_rate(config.client_rate), None
    found = sweep(config, say)
    say(f"client.learning_rate: {found.rate:g}: {found.why}")
    return config.with_client_rate(found.rate), found


def sweep(config: Config, say: Callable[[str], None], *, steps: int = STEPS) -> Sweep:
    """Try the method's rates; `say` is told of each, with the time left. Deterministic in the config.

    Raises:
        NonFiniteError: if even a client that stays as it is diverges.
    """
    rates, losses = _rates(config), {}
    begin = time.perf_counter()
    for place, rate in enumerate((0.0, *rates)):
        losses[rate] = _held_out_losses(config, rate, steps)
        left_s = (time.perf_counter() - begin) / (place + 1) * (len(rates) - place)
        shown = "diverged" if losses[rate] is None else f"held-out loss {mean(losses[rate]):.4f}"
        say(f"client.learning_rate: auto, {rate:g} for {steps} steps: {shown}; {left_s:.0f} s left")
    stays = losses.pop(0.0)
    if stays is None:
        raise NonFiniteError(
            f"client.learning_rate: auto: the server diverged within {steps} steps though the client stayed as it is; "
            "lower server.learning_rate"
        )
    return _chosen([_tried(rate, found, stays) for rate, found in losses.items()], steps)


def _chosen(tried: list[Tried], steps: int) -> Sweep:
    """The largest gain that can be told from none; if there is no such, the largest rate that did no harm.

    Harm is a loss above that of rate 0, by however little: a margin of its own error would let the noisiest rate pass.
    """
    best = max((t for t in tried if t.gained), key=lambda t: _number(t.gain_nats), default=None)
    if best is not None:
        gain = f"{best.gain_nats:.4f} ± {best.gain_standard_error:.4f} nats"
        why = f"the largest gain that is no noise, after {steps} steps {gain} below a client that stays as it is"
        return Sweep(best.rate, why, tuple(tried))
    finite = [t for t in tried if t.gain_nats is not None]
    harmless = [t for t in finite if _number(t.gain_nats) >= 0]
    why = f"after {steps} steps no rate can be told to beat a client that stays as it is; "
    if harmless:
        why += "the largest that did no harm, a longer run may use it"
        return Sweep(harmless[-1].rate, why, tuple(tried))
    why += "all tried raised the held-out loss: the smallest, look at the data"
    return Sweep((finite or tried)[0].rate, why, tuple(tried))


def _tried(rate: float, losses: list[float] | None, stays: list[float]) -> Tried:
    if losses is None:
        return Tried(rate, None, None, None)
    gains = [before - after for before, after in zip(stays, losses, strict=True)]
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    return Tried(rate, mean(losses), mean(gains), error)


def _held_out_losses(config: Config, rate: float, steps: int) -> list[float] | None:
    """By batch, after the steps at this rate; None where they diverge."""
    short = replace(
        config.with_client_rate(rate), lr_scheduler_type="constant", warmup_steps=0, max_steps=steps
    )
    session = new_session(short)
    seen, held_out = _batches(session, steps)
    try:
        for step, batch in enumerate(seen, start=1):
            session.round(batch, step)
        found = [session.server.losses([session.client.forward(b)], b.targets)[0] for b in held_out]
    except NonFiniteError:
        return None
    return found if all(map(math.isfinite, found)) else None


def _batches(session: LocalSession, steps: int) -> tuple[list[Batch], list[Batch]]:
    """Batches for the steps, and held-out ones of other rows: smaller ones rather than fewer, for the error's sake."""
    config, task = session.config, session.task
    size, rows = config.per_device_train_batch_size, len(task.train)
    order = batch_indices(config.seed, 1, rows, rows)
    held = max(min(HELD_OUT_BATCHES * size, rows // 5), 1)
    trained, kept = order[:-held] or order, order[-held:]
    batches = min(HELD_OUT_BATCHES, held)
    ends = [held * place // batches for place in range(batches + 1)]

    def batch(indices: list[int]) -> Batch:
        return task.collate([task.train[i] for i in indices])

    return (
        [batch([trained[(step * size + i) % len(trained)] for i in range(size)]) for step in range(steps)],
        [batch(kept[start:end]) for start, end in pairwise(ends)],
    )


def _rates(config: Config) -> tuple[float, ...]:
    if config.method in ("fo-fo", "fo-zo") and config.client.optimiser.name == "adamw":
        return ADAPTIVE
    if config.method in ("hosl", "hosl-gradient", "zo-zo"):
        # adapters are few numbers, their directions short: rates a thousand times higher
        return tuple(rate * 1e3 for rate in PROBED) if config.client.trainable == "lora" else PROBED
    return DESCENDED


def _number(value: float | None) -> float:
    assert value is not None, "of a rate that did not diverge"
    return value
