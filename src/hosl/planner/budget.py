"""client.memory_budget against the plan, before a run; at every step: `training.memory_budget`."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from hosl.config import Config
from hosl.errors import BudgetError
from hosl.methods.schedule import longest_batch, most_scored
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.system.byte_sizes import parse_bytes
from hosl.system.gc_paused import gc_paused
from hosl.system.machine import process_bytes
from hosl.system.model_limits import check_row_length
from hosl.system.readable import readable_bytes
from hosl.tasks import Task

if TYPE_CHECKING:
    from hosl.planner.plan import Demand

_JOINED_BYTES = 52 << 20
"""The memory that a joined client adds to its process after this check: the connection, and code and pools of the first
passes (docs/log.md, 2026-11-28)."""
_NOTHING_ELSE = "raise the budget, or see `hosl plan` for ways that take less"


def check_before_data(config: Config, model: str, *, head: Any = None, alone: bool) -> None:
    """Refuse a budget below the memory of Python and one block's weights: no data and no cut could meet it.

    Args:
        config: the settings of the run.
        model: the model's name, or the folder of its half.
        head: the head of the model; None: the one that its family has.
        alone: whether the client has a process of its own, with a connection.

    Raises:
        BudgetError: if the budget is below.
    """
    if config.client.memory_budget is None:
        return
    limit, base = _limit(config), _base(alone)
    if base < limit:  # imports only now: a run without a budget needs no planner
        from hosl.planner.costs import weight_bytes, with_cut
        from hosl.planner.model_shape import model_shape

        shape = model_shape(model, head=head)
        if base + max(weight_bytes(with_cut(config, min(config.model.cut, 1)), shape)) <= limit:
            return
    raise BudgetError(
        f"{_budget(limit)}, but the client would take {readable_bytes(base)} before any weight, and there is no cut "
        f"whose weights fit into what is left; {_NOTHING_ELSE}"
    )


def check_before_run(config: Config, model: str, task: Task, *, alone: bool) -> None:
    """Refuse rows that the model scores by their neighbours, and a budget that the longest batches would exceed.

    Args:
        config: the settings of the run.
        model: the model's name, or the folder of its half.
        task: the data.
        alone: whether the client has a process of its own, with a connection.

    Raises:
        SplitError: naming the length up to which rows have scores of their own.
        BudgetError: naming the nearest setting that fits.
    """
    from hosl.split import resolve_model_folder
    from hosl.split.reading.config_json import read_config

    longest = max(
        len(row) for part in (task.train, task.dev, task.test) for example in part for row in example.rows
    )
    read = read_config(resolve_model_folder(model), model)
    check_row_length(read.get_text_config().to_dict(), read.model_type, longest)
    if config.client.memory_budget is None:
        return
    from hosl.planner.plan import most_needed, nearest_that_fits

    limit, base = _limit(config), _base(alone, held=process_bytes() if alone else 0)
    tokens, demands = _demands(config, model, task, base)
    with gc_paused():
        needed = most_needed(demands(config))
        if needed <= limit:
            return
        nearest = nearest_that_fits(config, tokens, demands, limit)
    if nearest is None:
        advice = f"no micro-batch and no lower cut brings method {config.method} below it; {_NOTHING_ELSE}"
    else:
        advice = f"the nearest setting that fits: {_changes(nearest, config)}"
    raise BudgetError(
        f"{_budget(limit)}, but the client would take {readable_bytes(needed)} ({readable_bytes(base)} of it before "
        f"any weight); {advice}"
    )


def _demands(
    config: Config, model: str, task: Task, base: float
) -> tuple[int, Callable[[Config], "list[Demand]"]]:
    """The tokens of the longest row, and the function that gives a config's demands in training and evaluation."""
    from hosl.planner.costs import CostCache, beyond_weights, clean_pass, client_memory, weight_bytes
    from hosl.planner.model_shape import model_shape
    from hosl.planner.plan import Demand

    labels = len(task.labels) if task.head == "classification" else None
    shape = replace(model_shape(model, head=task.head, num_labels=labels), scored_tokens=most_scored(task))
    rows, train = longest_batch(task, config)
    longest = max(len(row) for e in (*task.dev, *task.test) for row in e.rows)
    costs: CostCache = {}

    @cache
    def demands(tried: Config) -> list[Demand]:
        eval_rows = tried.per_device_eval_batch_size
        step = cache(lambda: client_memory(tried, shape, costs)(rows, train))

        def training() -> float:
            _, peak, loading = step()
            return base + max(peak, loading)

        def evaluation() -> float:  # forward passes, beside the memory that training holds between its steps
            # a client that descends gradients may hold an optimiser's state, too
            held = step()[0] if tried.method_row.memory_by_cut else weight_bytes(tried, shape)[0]
            return base + held + beyond_weights(clean_pass(tried), shape, costs)(eval_rows, longest)

        return [Demand(rows, training), Demand(eval_rows, evaluation)]

    return max(train, longest), demands


def _limit(config: Config) -> float:
    return float(parse_bytes(config.client.memory_budget or ""))


def _base(alone: bool, held: float = 0) -> float:
    """Bytes before any weight; `held`: what the process has already, more than the usual base on some machines."""
    return max(RUNTIME_BASE_BYTES, held) + (_JOINED_BYTES if alone else 0)


def _budget(limit: float) -> str:
    return f"client.memory_budget is {readable_bytes(limit)}"


def _changes(nearest: Config, config: Config) -> str:
    changes = [f"client.micro_batch_size: {nearest.client.micro_batch_size}"]
    if nearest.model.cut != config.model.cut:
        changes.append(f"model.cut: {nearest.model.cut}")
    return ", ".join(changes)
