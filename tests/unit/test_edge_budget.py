"""client.memory_budget of a device without torch: refused before a run, with the setting that fits."""

import msgspec
import pytest

from hosl.config import Config
from hosl.errors import BudgetError
from hosl.planner import edge_budget
from hosl.planner.edge_memory import EDGE_BASE_BYTES, PlannedMemory
from hosl.tasks import Example
from hosl.tasks.classification import ClassificationTask

MIB = 2**20
ROWS = (Example(((1,) * 32,)),) * 20
TASK = ClassificationTask("words", ("a", "b"), ROWS, ROWS, ROWS, pad_id=0)


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """`plan(budget, method)` checks a budget against a plan of 1 MiB per row at once, of an evaluation half of it."""

    def planned(config, folder, rows, tokens, *, evaluation=False):
        at_once = min(rows, config.client.micro_batch_size or 128)
        return PlannedMemory(at_once * MIB / (2 if evaluation else 1), 10.0 * MIB)

    monkeypatch.setattr(edge_budget, "planned_process_bytes", planned)

    def check(budget):
        client = msgspec.structs.replace(Config().client, memory_budget=budget)
        config = msgspec.structs.replace(
            Config(), method="fo-recompute", client=client, per_device_train_batch_size=20
        )
        edge_budget.check_edge_budget(config, tmp_path, TASK)

    return check


def test_a_budget_that_the_plan_meets_is_let_through(plan):
    base_mib = int(EDGE_BASE_BYTES / MIB)
    plan(None)
    plan(f"{base_mib + 10 + 20}MiB")


def test_the_largest_micro_batch_that_fits_is_named(plan):
    base_mib = int(EDGE_BASE_BYTES / MIB)
    with pytest.raises(BudgetError, match=f"would take {base_mib + 30} MiB .* client.micro_batch_size: 16$"):
        plan(f"{base_mib + 29}MiB")
    with pytest.raises(BudgetError, match=r"client.micro_batch_size: 4$"):
        plan(f"{base_mib + 10 + 5}MiB")


def test_a_budget_below_what_no_micro_batch_changes_names_other_ways(plan):
    base_mib = int(EDGE_BASE_BYTES / MIB)
    with pytest.raises(
        BudgetError, match="no micro-batch brings method fo-recompute below it; raise the budget"
    ):
        plan(f"{base_mib + 10}MiB")
