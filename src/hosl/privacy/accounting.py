"""The (epsilon, delta) of the noise on activations, by Google's dp-accounting: per message, and over a run.

What is protected is one text, against any other of as many tokens: lengths are seen anyway. Every token's vector has a
norm of at most C, so a text of T tokens moves what is sent by at most 2 C sqrt(T), whatever it says. The server sees
which rows a message has, so nothing is gained by sampling them; a text that is sent K times is composed K times.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.methods.schedule import with_steps
from hosl.system.readable import readable_count
from hosl.tasks import Task

DELTA = 1e-5
_ORDERS = tuple((1 + np.logspace(-4, 3, 200)).tolist())
"""The orders of Renyi's divergence that are tried: weak noise needs some close to 1."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the texts of one split can lose in a run at most."""

    split: str
    """train, or dev and test, which are sent for evaluation."""
    tokens: int
    """The tokens of the longest row."""
    messages: int
    """The number of messages that a row is part of, at most."""
    of_message: float
    """The epsilon of one of them, at `DELTA`."""
    of_run: float
    """The epsilon of all of them together, at `DELTA`."""

    def line(self) -> str:
        """The sentence for people."""
        return (
            f"a text of {self.split} with {readable_count(self.tokens, 'token')}: epsilon {_shown(self.of_message)} a "
            f"message, {_shown(self.of_run)} over {readable_count(self.messages, 'message')}, delta {DELTA:g}"
        )


def spent(config: Config, task: Task) -> list[Spent]:
    """The loss of each split's longest text. Requires: `wire.noise_multiplier` > 0.

    Raises:
        ConfigError: if dp-accounting is not installed.
    """
    config = with_steps(config, task)
    batch, rows = config.per_device_train_batch_size, max(len(task.train), 1)
    evaluations = math.ceil(config.max_steps / config.eval_steps)
    counts = {"train": math.ceil(config.max_steps * batch / rows), "dev": evaluations + 1, "test": 1}
    losses = []
    for split, messages in counts.items():
        lengths = [len(row) for example in getattr(task, split) or () for row in example.rows]
        if not lengths:
            continue
        multiplier = config.wire.noise_multiplier / (2 * math.sqrt(max(lengths)))
        of_message, of_run = epsilon(multiplier, 1), epsilon(multiplier, messages)
        losses.append(
            Spent(split=split, tokens=max(lengths), messages=messages, of_message=of_message, of_run=of_run)
        )
    return losses


def epsilon(multiplier: float, messages: int, delta: float = DELTA) -> float:
    """The epsilon of a Gaussian mechanism that is used `messages` times.

    Args:
        multiplier: standard deviation of the noise over the mechanism's sensitivity.
        messages: the number of uses.
        delta: the probability that may remain.

    Raises:
        ConfigError: if dp-accounting is not installed.
    """
    accounting = _library()
    event = accounting.SelfComposedDpEvent(accounting.GaussianDpEvent(multiplier), messages)
    accountant = accounting.rdp.RdpAccountant(_ORDERS)
    return float(accountant.compose(event).get_epsilon(delta))


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError as missing:
        raise ConfigError(
            "the epsilon of wire.noise_multiplier is computed by dp-accounting, which is not installed; "
            "`pip install 'hosl[privacy]'`"
        ) from missing
    return dp_accounting


def _shown(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"
