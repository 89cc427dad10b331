"""The (epsilon, delta) of the noise on activations, by Google's dp-accounting: of a message, and of a run.

What is protected is one text against any other of as many tokens, in its activations alone: lengths are seen, and
labels are sent as the config says. Every token's vector has a norm of at most C, so a text of T tokens moves what is
sent by at most 2 C sqrt(T), whatever it says. The server sees which rows a message has, so nothing is gained by
sampling them; a text that is sent K times is composed K times. That holds for a client that never changes. Where the
client is trained, a text also moves its weights, and with them every later message of any text: no bound is known here.
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
    """What the activations of the texts of one split tell at most."""

    split: str
    """train, dev or test; the last two are sent for evaluation."""
    tokens: int
    """The tokens of the longest row."""
    rows: int
    """The rows that a message has of one text: its candidates in evaluation."""
    messages: int
    """The number of messages that a text is part of, at most."""
    of_message: float
    """The epsilon of one of them, at `DELTA`."""
    of_run: float | None
    """The epsilon of all of them together, at `DELTA`; None: no bound, as the client is trained."""

    def line(self) -> str:
        """The sentence for people."""
        run = (
            "no bound over the run, as the client's weights carry it into other messages"
            if self.of_run is None
            else f"{_shown(self.of_run)} over {readable_count(self.messages, 'message')}"
        )
        return (
            f"a text of {self.split} with {readable_count(self.tokens, 'token')}: epsilon {_shown(self.of_message)} a "
            f"message, {run}, delta {DELTA:g}"
        )


def spent(config: Config, task: Task) -> list[Spent]:
    """The loss of each split's longest text. Requires: `wire.noise_multiplier` > 0.

    Raises:
        ConfigError: if dp-accounting is not installed, or the text crosses beside its activations.
    """
    if config.task.__struct_config__.tag == "sft":
        what = "its tokens" if config.wire.labels == "server" else "the gradient at the last states"
        raise ConfigError(f"no epsilon: where text is learned, {what} crosses without noise")
    config = with_steps(config, task)
    evaluations = math.ceil(config.max_steps / config.eval_steps)
    in_train = math.ceil(config.max_steps * config.per_device_train_batch_size / max(len(task.train), 1))
    candidates, frozen = task.rows_per_example(), config.method_row.trains == "nothing"
    losses = []
    for split, messages, rows in (
        ("train", in_train, 1), ("dev", evaluations + 1, candidates), ("test", 1, candidates),
    ):  # fmt: skip
        lengths = [len(row) for example in getattr(task, split) or () for row in example.rows]
        if not lengths:
            continue
        multiplier = config.wire.noise_multiplier / (2 * math.sqrt(max(lengths) * rows))
        losses.append(
            Spent(
                split=split, tokens=max(lengths), rows=rows, messages=messages, of_message=epsilon(multiplier, 1),
                of_run=epsilon(multiplier, messages) if frozen else None,
            )
        )  # fmt: skip
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
