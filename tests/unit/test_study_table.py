"""What a study's table says where a row cannot be compared with the two it is measured by."""

from dataclasses import replace

import yaml
from msgspec import structs

from hosl.report.comparison import LOSS as TEST_LOSS
from hosl.report.tables import compared
from hosl.study.config import parse_study, study_grid, study_groups
from hosl.study.grid import merged
from hosl.study.tables import caption, group_comparison, label_with_gap

STUDY = """
output_dir: out
seeds: [0, 1, 2]
base: {max_steps: 10, server: {learning_rate: 0.5}}
tasks: {a: {}}
methods:
  frozen: {}
  long: {rates: [0.1], settings: {method: hosl, max_steps: 100}}
  fo-fo: {rates: [0.1]}
"""
LOSS = {"frozen": 1.0, "long": 0.5, "fo-fo": 0.8}


def _cells(losses, changes=None, seeds=(0, 1, 2), without_config=()):
    """Method -> its cells by heading; a row's test loss is its own, a little apart from seed to seed."""
    study = structs.replace(parse_study(yaml.safe_load(STUDY), where="here"), seeds=seeds)
    (group,) = study_groups(study)
    chosen = {}
    for name, row in _rows().items():
        changed = replace(row, settings=merged(row.settings, (changes or {}).get(name, {})))
        chosen[row.name] = [_summary(changed, losses[name], seed) for seed in seeds]
        for summary in chosen[row.name] if name in without_config else ():
            del summary["config"]
    comparison = group_comparison(study, group, chosen)
    table = compared(comparison)
    lines = [[f"{cell.text} {cell.aside}".strip() for cell in line] for line in table.lines]
    return {line[0]: dict(zip(table.head, line, strict=True)) for line in lines}, caption(study, [comparison])


def _rows():
    rows = study_grid(parse_study(yaml.safe_load(STUDY), where="here")).arms
    return {row.name.removeprefix("a-"): row for row in rows}


def _summary(row, loss, seed):
    return {
        "row": row.name, "rate": row.rates[0], "server_rate": 0.5, "seed": seed, "config": row.settings,
        "test_loss_nats": loss + 0.01 * seed, "test_accuracy": 0.5 + 0.01 * seed, "client_peak_bytes": 1,
        "bytes_up_per_step": 1, "bytes_down_per_step": 1, "median_step_s": 1.0,
    }  # fmt: skip


def test_a_row_of_other_steps_is_not_compared():
    cells, _ = _cells(LOSS)
    assert cells["long"]["G (loss)"] == cells["long"]["p"] == "n/a (other steps, batches or task)"
    assert cells["fo-fo"]["G (loss)"] == "1.00 [1.00, 1.00]"
    assert cells["frozen"]["G (accuracy)"] == "n/a (gap not resolved)"


def test_a_first_order_row_of_other_steps_is_no_yardstick():
    cells, _ = _cells(LOSS, {"fo-fo": {"max_steps": 5}})
    assert cells["frozen"]["G (loss)"] == "n/a (first-order: other steps, batches or task)"
    assert cells["fo-fo"]["G (loss)"] == "n/a (other steps, batches or task)"


def test_a_picture_has_no_gap_closure_where_the_table_has_none():
    study = parse_study(yaml.safe_load(STUDY), where="here")
    chosen = {
        row.name: [_summary(row, LOSS[name], seed) for seed in (0, 1, 2)] for name, row in _rows().items()
    }
    rows = group_comparison(study, study_groups(study)[0], chosen).rows
    assert [label_with_gap(row, TEST_LOSS) for row in rows] == [
        "frozen  G 0.00 [0.00, 0.00]", "long  G n/a", "fo-fo  G 1.00 [1.00, 1.00]"
    ]  # fmt: skip


def test_where_first_order_is_the_worse_there_is_no_gap_closure():
    cells, _ = _cells(LOSS | {"fo-fo": 1.2})
    assert cells["frozen"]["G (loss)"] == cells["fo-fo"]["G (loss)"] == "n/a (first-order is not better)"


def test_one_seed_has_neither_p_nor_gap_closure_nor_a_caption_about_them():
    cells, said = _cells(LOSS, seeds=(0,))
    assert "G (loss)" not in cells["fo-fo"]
    assert cells["fo-fo"]["test loss, nats"] == "0.8000"
    assert said.startswith("One seed: no spread, no p, no gap closure. Client rates: ")


def test_a_summary_of_an_earlier_version_without_a_config_is_compared_as_ever():
    cells, _ = _cells(LOSS, without_config=("fo-fo",))
    assert cells["fo-fo"]["G (loss)"] == "1.00 [1.00, 1.00]"
    cells, _ = _cells(LOSS, without_config=("frozen",))
    assert cells["fo-fo"]["G (loss)"] == "1.00 [1.00, 1.00]"
