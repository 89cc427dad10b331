"""client.memory_budget against the plan, before a run; against the process at every step: `budget`."""

import gc
from typing import Any

from hosl.config import Config
from hosl.core.sizes import parse_bytes, told_bytes
from hosl.errors import BudgetError
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.tasks import Task

_NETWORK_BYTES = 26 << 20
"""What a connection adds to a client process, grpc's import included (docs/log.md, 2026-11-23)."""
_NO_TOKENS = 8
"""Per row, where the data is not known yet: less than any text has."""


def check_before_data(config: Config, model: str, *, head: Any = None, alone: bool) -> None:
    """Refuse a budget that no data could meet: weights and a batch of next to nothing.

    Raises:
        BudgetError: naming what would fit.
    """
    if config.client.memory_budget is not None:
        _check(config, model, head, None, alone, [(config.per_device_train_batch_size, _NO_TOKENS)])


def check_before_run(config: Config, model: str, task: Task, *, alone: bool) -> None:
    """Refuse a budget that the longest batches of training and evaluation would not meet.

    Raises:
        BudgetError: naming the nearest setting that fits.
    """
    if config.client.memory_budget is None:
        return
    train = max(len(e.rows[e.label if len(e.rows) > 1 else 0]) for e in task.train)
    rows = max(len(row) for e in (*task.dev, *task.test) for row in e.rows)
    sizes = [(config.per_device_train_batch_size, train), (config.per_device_eval_batch_size, rows)]
    labels = len(task.labels) if task.head == "classification" else None
    _check(config, model, task.head, labels, alone, sizes)


def _check(
    config: Config, model: str, head: Any, labels: int | None, alone: bool, sizes: list[tuple[int, int]]
) -> None:
    # only now: a run without a budget does without what a plan needs
    from hosl.planner.costs import clean_pass, client_memory
    from hosl.planner.model_shape import model_shape
    from hosl.planner.plan import nearest_that_fits

    limit = float(parse_bytes(config.client.memory_budget or ""))
    shape = model_shape(model, head=head, num_labels=labels)
    base = RUNTIME_BASE_BYTES + (_NETWORK_BYTES if alone else 0)

    known: dict[Any, Any] = {}

    def takes(tried: Config) -> float:
        (train_rows, train_tokens), *evaluation = sizes
        static, peak, loading = client_memory(tried, shape, known)(train_rows, train_tokens)
        worst = max(peak, loading)
        for rows, tokens in evaluation:  # forward passes, with what training holds between its steps
            of_weights, forward, _ = client_memory(clean_pass(tried), shape, known)(rows, tokens)
            worst = max(worst, static + forward - of_weights)
        return base + worst

    gc.disable()  # a person waits, and a step run without data makes a million short-lived objects
    try:
        needed = takes(config)
        fits = needed <= limit
        longest = max(tokens for _, tokens in sizes)
        nearest = None if fits or limit <= base else nearest_that_fits(config, longest, takes, limit)
    finally:
        gc.enable()
    if fits:
        return
    if nearest is None:
        advice = (
            f"no micro-batch and no lower cut brings method {config.method} below it; raise the budget, or see "
            "`hosl plan` for ways that take less"
        )
    else:
        advice = f"the nearest setting that fits: {_told(nearest, config)}"
    raise BudgetError(
        f"client.memory_budget is {told_bytes(limit)}, but the client would take {told_bytes(needed)} "
        f"({told_bytes(base)} of it before any weight); {advice}"
    )


def _told(nearest: Config, config: Config) -> str:
    changed = [f"client.micro_batch_rows: {nearest.client.micro_batch_rows}"]
    if nearest.model.cut != config.model.cut:
        changed.append(f"model.cut: {nearest.model.cut}")
    return ", ".join(changed)
