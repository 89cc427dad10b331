"""client.memory_budget against the plan of a client on the engine, before a run. No torch.

On torch: `planner.budget`. At every step of a run: `training.memory_budget`.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from hosl.config import Config
from hosl.errors import BudgetError
from hosl.methods.schedule import longest_batch
from hosl.parties.micro_batches import TOKENS_AT_ONCE
from hosl.planner.edge_memory import EDGE_BASE_BYTES, PlannedMemory, planned_process_bytes
from hosl.system.byte_sizes import parse_bytes
from hosl.system.readable import readable_bytes
from hosl.tasks import Task


def check_edge_budget(config: Config, folder: Path, task: Task) -> None:
    """Refuse a budget that the longest batches of training or evaluation would exceed.

    Args:
        config: the settings of the run.
        folder: OUT/client of `hosl split --runtime onnx`.
        task: the data.

    Raises:
        BudgetError: naming the largest micro-batch that fits, if one does.
        ModelError: as in `planned_process_bytes`.
    """
    if config.client.memory_budget is None:
        return
    limit = float(parse_bytes(config.client.memory_budget))
    rows, tokens = longest_batch(task, config)
    longest = max(len(row) for example in (*task.dev, *task.test) for row in example.rows)
    each = task.rows_per_example()
    scored = min(max(config.per_device_eval_batch_size // each, 1), max(len(task.dev), len(task.test))) * each

    @cache
    def most(tried: Config) -> PlannedMemory:
        training = planned_process_bytes(tried, folder, rows, tokens)
        evaluation = planned_process_bytes(tried, folder, scored, longest, evaluation=True)
        return max(training, evaluation, key=lambda planned: planned.process_bytes)

    planned = most(config)
    if planned.process_bytes <= limit:
        return
    fits = next(
        (tried for tried in _smaller(config, max(tokens, longest)) if most(tried).process_bytes <= limit),
        None,
    )
    advice = (
        f"no micro-batch brings method {config.method} below it; raise the budget, split at a lower cut, or train less "
        "(client.trainable: last-block or lora)"
        if fits is None
        else f"the nearest setting that fits: client.micro_batch_size: {fits.client.micro_batch_size}"
    )
    taken, base = readable_bytes(planned.process_bytes), readable_bytes(EDGE_BASE_BYTES)
    raise BudgetError(
        f"client.memory_budget is {readable_bytes(limit)}, but the client would take {taken} ({base} of it before any "
        f"weight); {advice}"
    )


def _smaller(config: Config, tokens: int) -> Iterator[Config]:
    """The config with fewer and fewer rows at once, down to one."""
    rows = config.client.micro_batch_size or max(TOKENS_AT_ONCE // tokens, 1)
    while rows > 1:
        rows //= 2
        yield msgspec.structs.replace(
            config, client=msgspec.structs.replace(config.client, micro_batch_size=rows)
        )
