"""The examples and the learning rate of a step: functions of the step alone, so that a resume needs no state."""

import math
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b

import msgspec
import numpy as np

from hosl.config import Config
from hosl.core.targets import Batch
from hosl.tasks import Example, SftConfig, Task


def batch_of_step(config: Config, task: Task, step: int) -> Batch:
    """The training batch of `step` (from 1)."""
    return task.collate([task.train[i] for i in _indices(config, task, step)])


def batch_indices(seed: int, step: int, batch: int, examples: int) -> list[int]:
    """The examples of `step` (from 1): every epoch is a fresh permutation; a batch may span two epochs."""
    indices = []
    for position in range((step - 1) * batch, step * batch):
        epoch, rank = divmod(position, examples)
        indices.append(int(_permutation(seed, epoch, examples)[rank]))
    return indices


def alike_indices(seed: int, step: int, batch: int, lengths: tuple[int, ...]) -> list[int]:
    """The examples of `step` (from 1), of like lengths: each once in an epoch, as in `batch_indices`.

    The rows of 50 batches are drawn at random and sorted by length; the batches of an epoch then come in random order.
    A batch that spans two epochs, and the rest of an epoch, are drawn without regard to length.
    """
    indices = []
    for position in range((step - 1) * batch, step * batch):
        epoch, rank = divmod(position, len(lengths))
        indices.append(int(_alike(seed, epoch, batch, lengths)[rank]))
    return indices


def with_steps(config: Config, task: Task) -> Config:
    """The config with max_steps in place of num_train_epochs, now that the training rows are counted.

    Raises:
        ConfigError: if warmup_steps is more than that.
    """
    if config.num_train_epochs is None:
        return config
    steps = math.ceil(config.num_train_epochs * len(task.train) / config.per_device_train_batch_size)
    return msgspec.structs.replace(config, max_steps=steps, num_train_epochs=None)


def longest_batch(task: Task, config: Config) -> tuple[int, int]:
    """Rows and tokens of the longest batch that training can draw."""
    return min(config.per_device_train_batch_size, len(task.train)), max(map(_trained_tokens, task.train))


def usual_batch(task: Task, config: Config) -> tuple[int, int]:
    """The mean tokens of a padded row, and the mean of those learned one by one, over the run's first batches."""
    steps = range(1, min(config.max_steps, _STEPS_LOOKED_AT) + 1)
    batches = [[task.train[i] for i in _indices(config, task, step)] for step in steps]
    tokens = [max(_trained_tokens(example) for example in batch) for batch in batches]
    scored = [_scored(example) for batch in batches for example in batch]
    return round(sum(tokens) / len(tokens)), math.ceil(sum(scored) / len(scored))


def most_scored(task: Task) -> int:
    """The most tokens of a training row that are learned one by one; 0: rows have a label, or candidate answers."""
    return max(map(_scored, task.train), default=0)


def learning_rate(config: Config, base: float) -> Callable[[int], float]:
    """The function from a step to its learning rate: warm-up from 0, then constant, linear or cosine to 0."""

    def rate_of(step: int) -> float:
        if step <= config.warmup_steps:
            return base * step / config.warmup_steps
        progress = (step - 1 - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
        match config.lr_scheduler_type:
            case "constant":
                return base
            case "linear":
                return base * (1 - progress)
            case "cosine":
                return base * 0.5 * (1 + math.cos(math.pi * progress))

    return rate_of


_STEPS_LOOKED_AT = 200
"""Batches by which the usual length is told: of a thousand, a fifth is enough for a forecast of hours."""


def _indices(config: Config, task: Task, step: int) -> list[int]:
    batch = config.per_device_train_batch_size
    if isinstance(config.task, SftConfig) and config.task.group_by_length:
        lengths = tuple(len(example.rows[0]) for example in task.train)
        return alike_indices(config.seed, step, batch, lengths)
    return batch_indices(config.seed, step, batch, len(task.train))


def _trained_tokens(example: Example) -> int:
    """Tokens of the row that training reads: of several answers the right one."""
    return len(example.rows[example.label if len(example.rows) > 1 else 0])


def _scored(example: Example) -> int:
    """Tokens of an example that are learned one by one."""
    return sum(stop - start for start, stop in example.scored)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The examples in the order of the hash of (seed, epoch, index): the same on every machine."""
    hashes = [blake2b(f"{seed}/{epoch}/{i}".encode(), digest_size=8).digest() for i in range(examples)]
    return np.array(sorted(range(examples), key=hashes.__getitem__))


_SORTED_BATCHES = 50
"""Batches whose rows are sorted together, as transformers has it for group_by_length."""


@lru_cache(maxsize=2)
def _alike(seed: int, epoch: int, batch: int, lengths: tuple[int, ...]) -> np.ndarray:
    """The examples of an epoch in the order in which `alike_indices` takes them."""
    order = _permutation(seed, epoch, len(lengths))
    begun = -epoch * len(lengths) % batch  # the rows that fill the last batch of the epoch before
    whole = max(len(lengths) - begun, 0) // batch
    rows = order[begun : begun + whole * batch]
    of_length = np.array(lengths)
    batches = []
    for start in range(0, len(rows), _SORTED_BATCHES * batch):
        together = rows[start : start + _SORTED_BATCHES * batch]
        batches += np.split(together[np.argsort(of_length[together], kind="stable")], len(together) // batch)
    drawn = [batches[number] for number in _permutation(seed, epoch, whole)]
    return np.concatenate([order[:begun], *drawn, order[begun + whole * batch :]])
