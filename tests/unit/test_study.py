"""A study's file, the runs it stands for in their order, and the tables, without making one run."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import pytest
import yaml
from msgspec import structs

from hosl.errors import ConfigError, NonFiniteError
from hosl.study import run as study_module
from hosl.study.config import parse_study, read_study, study_grid, study_groups
from hosl.study.files import Places
from hosl.study.grid import Arm, Grid, merged
from hosl.study.run import config_of_run, run_study
from hosl.study.runs_csv import run_lines
from hosl.study.tables import write_tables
from hosl.system.machine import cores

STUDY = {
    "output_dir": "out",
    "base": {"max_steps": 10, "server": {"learning_rate": 0.5}},
    "tasks": {"a": {}, "b": {"model": {"cut": 2}}},
    "methods": {"frozen": {}, "fo-fo": {"rates": [0.1, 0.2]}, "hosl": {"rates": [0.01, 0.02]}},
    "seeds": [4, 5],
}


OWN_SERVER = {"server": {"learning_rate": 9.0}}


def _hosl(**changes):
    return STUDY["methods"] | {"hosl": STUDY["methods"]["hosl"] | changes}


@pytest.fixture
def study(tmp_path):
    """`study(**settings)` writes and loads one."""

    def make(**settings):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | settings))
        return parse_study(read_study(path), where=str(path))

    return make


def _play(grid, loss_of):
    """Make every run by a function of its rates; returns (summaries, names in the order of asking)."""
    done, asked = {}, []
    while needed := grid.needed(done):
        run = needed[0]
        asked.append(run.name)
        loss = loss_of(run)
        done[run.name] = {
            "row": run.arm.name, "rate": run.rate, "server_rate": run.server_rate, "seed": run.seed,
            "command": f"hosl train {run.name}.yaml", "config": _config(run), "dev_loss_nats": loss,
            "versions": {"hosl": "1", "torch": "2", "machine": "m"},
            "dev_curve": [] if loss is None else [[10, loss, 0.5]],
            **({"diverged": "it must be finite"} if loss is None else _metrics(loss, run.seed)),
        }  # fmt: skip
    return done, asked


def _keep(done, places):
    """Write summaries where a study finds them."""
    places.summaries.mkdir(parents=True, exist_ok=True)
    for name, summary in done.items():
        (places.summaries / f"{name}.json").write_text(json.dumps(summary))


def _config(run):
    import msgspec

    return msgspec.to_builtins(run.config("out"))


def _metrics(loss, seed):
    return {
        "test_accuracy": 1 - loss + 0.01 * seed, "test_loss_nats": loss + 0.01 * seed, "dev_accuracy": 0.5, "steps": 10,
        "train_loss_nats": loss, "client_peak_bytes": 2**20, "server_peak_bytes": 1, "process_peak_bytes": 1,
        "bytes_up_per_step": 1024, "bytes_down_per_step": 4, "median_step_s": 0.5,
    }  # fmt: skip


def _loss(run):
    base = {"frozen": 1.0, "fo-fo": 0.2, "hosl": 0.6}[run.arm.settings["method"]]
    return base + run.rate / 100 + 0.001 * run.seed


def test_rates_are_tried_on_the_first_seed_and_the_best_runs_on_all():
    rows = (
        Arm("frozen", {"method": "frozen"}, server_learning_rates=(1.0, 2.0)),
        Arm("hosl", {"method": "hosl"}, (0.1, 0.2, 0.3)),
        Arm("zo-zo", {"method": "zo-zo"}, (0.5,), one_rate=True),
    )
    grid = Grid(rows, (7, 8))
    _, asked = _play(grid, lambda run: abs(run.rate - 0.2) + (run.server_rate != 2.0))
    assert sorted(asked) == sorted(
        [f"frozen-0-{rate}-seed7" for rate in (1, 2)]
        + ["frozen-0-2-seed8"]
        + [f"hosl-{rate}-2-seed7" for rate in (0.1, 0.2, 0.3)]
        + ["hosl-0.2-2-seed8", "zo-zo-0.5-0.5-seed7", "zo-zo-0.5-0.5-seed8"]
    )
    assert grid.total({}) == len(asked)


def test_what_waits_for_nothing_can_start_at_once():
    grid = Grid((Arm("frozen", {}, server_learning_rates=(1.0, 2.0)), Arm("hosl", {}, (0.1,))), (0,))
    assert [run.name for run in grid.needed({})] == ["frozen-0-1-seed0", "frozen-0-2-seed0"]


def test_a_row_that_diverges_at_every_rate_is_not_run_again(study):
    grid = study_grid(study())
    done, asked = _play(grid, lambda run: None if run.arm.settings["method"] == "hosl" else _loss(run))
    assert [name for name in asked if "hosl" in name and "seed5" in name] == []
    assert len(grid.chosen(done)["a-hosl"]) == 1
    assert grid.total(done) == len(done)


def test_a_frozen_row_that_diverges_at_every_rate_stops_the_study(study):
    grid = study_grid(study(server_learning_rates=[1.0, 2.0]))
    with pytest.raises(NonFiniteError, match="row a-frozen diverged at every server rate tried"):
        _play(grid, lambda run: None)


def test_groups_are_tasks_times_cuts_times_directions_and_share_what_does_not_probe(study):
    made = study(cuts=[2, 3], directions=[1, 4], tasks={"a": {}, "b": {}})
    groups, grid = study_groups(made), study_grid(made)
    assert len(groups) == 8
    assert groups[1].arms == {"frozen": "a-cut2-frozen", "fo-fo": "a-cut2-fo-fo", "hosl": "a-cut2-q4-hosl"}
    assert len(grid.arms) == 4 * 2 + 8  # frozen and fo-fo once for both Q
    config = grid.needed({})[-1].config("x")
    assert (config.model.cut, config.max_steps) == (3, 10)
    assert {row.settings["zo"]["directions"] for row in grid.arms if row.name.endswith("-hosl")} == {1, 4}


def test_sections_are_laid_over_each_other_but_another_kind_of_task_replaces_the_whole():
    base = {"task": {"kind": "docstrings", "max_tokens": 48}, "zo": {"epsilon": 0.1}}
    assert merged(base, {"task": {"max_tokens": 9}, "zo": {"directions": 2}}) == {
        "task": {"kind": "docstrings", "max_tokens": 9}, "zo": {"epsilon": 0.1, "directions": 2}
    }  # fmt: skip
    assert merged(base, {"task": {"kind": "files", "train": "x"}})["task"] == {"kind": "files", "train": "x"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": {"fo-fo": {"rates": [0.1]}}}, "frozen: methods has no row `frozen`, only fo-fo"),
        ({"methods": {"frozen": {}, "hosl": {"rates": [0.1]}}}, "first_order: methods has no row `fo-fo`"),
        ({"first_order": "hosl"}, "first_order: row `hosl` has method hosl; it must be fo-recompute or fo-fo"),
        ({"methods": STUDY["methods"] | {"zo-zo": {"rates": [0.1]}}}, "equally many rates, or the best-tuned wins"),
        ({"methods": STUDY["methods"] | {"frozen": {"rates": [0.1]}}}, "a frozen client has no rate"),
        ({"methods": STUDY["methods"] | {"frozen": {"one_rate": True}}}, "methods.frozen.one_rate: a frozen client"),
        ({"seedz": [1]}, "unknown field `seedz`; did you mean `seeds`?"),
        ({"methods": {"frozen": {"rate": 1}}}, "unknown field `rate` - at `$.methods[...]`; did you mean `rates`?"),
        ({"base": {"seed": 3}}, "base.seed: `seeds` has them; leave it out here"),
        ({"base": {"client": {"learning_rate": 0.1}}}, "base.client.learning_rate: `rates` of each method has them"),
        ({"cuts": [1], "tasks": {"b": {"model": {"cut": 2}}}}, "tasks.b.model.cut: `cuts` has them"),
        ({"tasks": {"a/b": {}}}, "`a/b` names files"),
        ({"tasks": {}}, "tasks is empty"),
        (
            {"server_learning_rates": [0.1], "tasks": {"a": OWN_SERVER}},
            "tasks.a.server.learning_rate: `server_learning_rates` has them",
        ),
        (
            {"server_learning_rates": [0.1], "methods": _hosl(settings=OWN_SERVER)},
            "methods.hosl.settings.server.learning_rate: `server_learning_rates` has them",
        ),
        (
            {"methods": _hosl(settings=OWN_SERVER, one_rate=True)},
            "methods.hosl.settings.server.learning_rate: by `one_rate` it is the client's",
        ),
        ({"tasks": {"a": {"method": "hosl"}}}, "tasks.a.method: each row of `methods` has its own"),
        ({"seeds": [1, 1]}, "seeds names one twice"),
        ({"seeds": [0, -1]}, "seeds must be >= 0, got [0, -1]"),
        ({"server_learning_rates": [0.1, 0.1]}, "server_learning_rates names one twice"),
        ({"cuts": [3, 3]}, "cuts names one twice"),
        ({"directions": [2, 2]}, "directions names one twice"),
        ({"methods": _hosl(rates=[0.1, math.inf])}, "methods.hosl.rates must be finite numbers >= 0, got [0.1, inf]"),
        ({"server_learning_rates": [math.nan]}, "server_learning_rates must be finite numbers >= 0"),
        ({"methods": _hosl(rates=[0.01, 0.01000001])}, "different numbers, in their first six digits"),
        ({"at_once": 0}, "at_once must be >= 1 or null, got 0"),
        ({"server_learning_rates": ["1e-3"]}, "YAML reads 1e-3 as text"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_meant_is_refused(study, settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        study(**settings)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no such file"), ("a: [", "is not YAML"), ("", "Expected `object`, got `null`")]
)
def test_a_file_that_is_no_study_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse_study(read_study(tmp_path / "s.yaml"), where="s.yaml")


def test_a_section_that_is_none_is_refused_by_its_row(study):
    with pytest.raises(ConfigError, match=r"config a-fo-fo: Expected `object`, got `int` - at `\$.client`"):
        study_grid(study(base={"client": 3}))


def test_two_rows_of_one_name_are_refused(study):
    methods = {**STUDY["methods"], "b-hosl": {"rates": [0.1, 0.2], "settings": {"method": "hosl"}}}
    with pytest.raises(ConfigError, match="two rows would be called a-b-hosl"):
        study_grid(study(tasks={"a": {}, "a-b": {}}, methods=methods))


def _tables(study, done, folder):
    """table.md and table.tex."""
    files = write_tables(
        study, study_groups(study), study_grid(study).chosen(done), folder, "hosl study s.yaml"
    )
    return [Path(files[name]).read_text() for name in ("table", "latex")]


def test_the_table_has_spread_p_and_gap_closure(study, tmp_path):
    made = study(tasks={"a": {}})
    done, _ = _play(study_grid(made), _loss)
    text, written = _tables(made, done, tmp_path)
    (hosl,) = [line for line in text.splitlines() if line.startswith("| hosl ")]
    assert hosl.startswith("| hosl | 0.01 | 0.5 | 44.04 ± 0.64 [")
    assert " | 0.5 | 0.50 [0.50, 0.50] | " in hosl  # two seeds: p is never under 0.5
    (frozen,) = [line for line in text.splitlines() if line.startswith("| frozen ")]
    assert " |  | 0.00 [0.00, 0.00] | " in frozen
    assert "# hosl\nhosl study s.yaml --run a-hosl-0.01-0.5-seed4" in text
    assert "sign-flip permutation test" in text
    assert written.count("\\\\\n") == 4
    assert r"44.04 $\pm$ 0.64" in written
    assert re.search(r"(?<!\\)%(?! \w[\w-]*:)", written) is None


def test_a_diverged_reference_row_leaves_the_values_and_takes_the_comparison(study, tmp_path):
    made = study(tasks={"a": {}})
    grid = study_grid(made)
    done, _ = _play(grid, lambda run: None if run.arm.settings["method"] == "fo-fo" else _loss(run))
    text, _ = _tables(made, done, tmp_path)
    assert "| fo-fo | 0.1 | 0.5 | diverged at every rate |" in text
    assert text.count("n/a (first-order diverged)") == 4


def test_test_stands_in_the_csv_for_chosen_runs_only(study):
    made = study()
    grid = study_grid(made)
    done, _ = _play(grid, _loss)
    lines = run_lines(study_groups(made), [done[run.name] for run in grid.settled(done)], grid.chosen(done))
    assert len(lines) == len(done)
    assert all((line["test_accuracy"] is not None) == line["chosen"] for line in lines)
    assert sum(line["chosen"] for line in lines) == 2 * 3 * 2
    assert {line["task"] for line in lines} == {"a", "b"}


def test_every_run_that_is_needed_has_a_config_by_its_name(study):
    made = study()
    grid = study_grid(made)
    done, _ = _play(grid, _loss)
    for run in grid.settled(done):
        config = config_of_run(made, run.name)
        assert config.output_dir.endswith(f"/again/{run.name}")
        assert structs.replace(config, output_dir="x") == run.config("x")
    with pytest.raises(ConfigError, match=r"no run of that name; it has \d+, such as a-hosl-"):
        config_of_run(made, "a-hosl-0.01-0.5-seed99")


def test_a_row_may_have_its_own_server_rate_where_the_study_gives_none(study):
    grid = study_grid(study(methods=_hosl(settings=OWN_SERVER), tasks={"a": {}}))
    assert {row.server_learning_rates for row in grid.arms} == {(0.5,), (9.0,)}


@pytest.fixture
def stopped(monkeypatch):
    """A study that is asked to stop before it makes a run."""
    monkeypatch.setattr(study_module, "run_grid", lambda grid, places, *, done, **_: done)


def test_a_finished_study_that_grows_no_longer_looks_finished(study, tmp_path, stopped):
    done, _ = _play(study_grid(study()), _loss)
    _keep(done, Places.below(tmp_path / "out"))
    (tmp_path / "out" / "runs.csv").write_text("of two seeds")
    grown = study(output_dir=str(tmp_path / "out"), seeds=[4, 5, 6])
    answer = run_study(grown, file="study.yaml", command="hosl study study.yaml")
    assert not answer["finished"]
    assert not (tmp_path / "out" / "runs.csv").exists()


def test_runs_of_a_row_that_is_gone_are_not_counted(study, tmp_path, stopped):
    wild = _hosl() | {"wild": {"rates": [8.0, 9.0], "settings": {"method": "hosl"}}}
    grid = study_grid(study(methods=wild))
    done, _ = _play(grid, lambda run: None if "wild" in run.arm.name else _loss(run))
    _keep(done, Places.below(tmp_path / "out"))
    without = study(output_dir=str(tmp_path / "out"), seeds=[4, 5, 6])
    assert run_study(without, file="study.yaml", command="")["diverged"] == 0


def test_commands_are_those_of_now_where_summaries_are_of_an_earlier_version(
    study, tmp_path, stopped, monkeypatch
):
    done, _ = _play(study_grid(study()), _loss)  # their commands name no number of threads
    _keep(done, Places.below(tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = study(output_dir=str(tmp_path / "out"))
    assert run_study(made, file="study.yaml", command="hosl study study.yaml")["finished"]
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        commands = [line["command"] for line in csv.DictReader(file)]
    assert len(commands) == len(done)
    assert all(command.startswith("OMP_NUM_THREADS=1 hosl train ") for command in commands)


def test_there_is_a_core():
    assert cores() >= 1
