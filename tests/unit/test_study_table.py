"""What a study's table says where a row cannot be compared with the two it is measured by."""

import yaml
from msgspec import structs

from hosl.run.study_config import parse_study, study_grid, study_groups
from hosl.run.study_table import caption, group_table

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


def _cells(losses, seeds=(0, 1, 2)):
    """Method -> its cells by heading; a row's test loss is its own, a little apart from seed to seed."""
    study = structs.replace(parse_study(yaml.safe_load(STUDY), where="here"), seeds=seeds)
    (group,) = study_groups(study)
    chosen = {
        row.name: [_summary(row, losses[row.name.removeprefix("a-")], seed) for seed in seeds]
        for row in study_grid(study).rows
    }
    table = group_table(study, group, chosen, "hosl study s.yaml")
    return {line[0]: dict(zip(table.head, line, strict=True)) for line in table.lines}, caption(
        len(seeds), study
    )


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


def test_where_first_order_is_the_worse_there_is_no_gap_closure():
    cells, _ = _cells(LOSS | {"fo-fo": 1.2})
    assert cells["frozen"]["G (loss)"] == cells["fo-fo"]["G (loss)"] == "n/a (first-order is not better)"


def test_one_seed_has_neither_p_nor_gap_closure_nor_a_caption_about_them():
    cells, said = _cells(LOSS, seeds=(0,))
    assert cells["fo-fo"]["G (loss)"] == "n/a (one seed)"
    assert cells["fo-fo"]["test loss, nats"] == "0.8000"
    assert said.startswith("One seed: no spread, no p, no gap closure. Client rates: ")
