"""What a study keeps of its runs, and when it refuses to go on with what is there."""

import re
from pathlib import Path

import pytest

from hosl.config import dump_config
from hosl.errors import FolderError
from hosl.study.config import study_grid
from hosl.study.files import Places, begun, check_same_study, read_summaries
from hosl.study.run import run_grid
from tests.unit import test_study

study, STUDY = test_study.study, test_study.STUDY
_keep, _loss, _play = test_study._keep, test_study._loss, test_study._play


def test_runs_made_with_other_settings_are_refused(study, tmp_path):
    places = Places.below(tmp_path)
    before = study_grid(study())
    done, _ = _play(before, _loss)
    _keep(done, places)
    assert set(read_summaries(before, places)) == set(done)
    after = study_grid(study(base={"max_steps": 11, "server": {"learning_rate": 0.5}}))
    with pytest.raises(FolderError, match="was made with max_steps: 10, the study now says max_steps: 11"):
        read_summaries(after, places)


def test_the_order_of_directions_changes_no_run_that_draws_none(study, tmp_path):
    places = Places.below(tmp_path)
    grid = study_grid(study(directions=[2, 10]))
    done, _ = _play(grid, _loss)
    _keep(done, places)
    other_way = study_grid(study(directions=[10, 2]))
    assert {run.name for run in other_way.settled(read_summaries(other_way, places))} == set(done)


def test_a_setting_of_a_section_that_differs_is_named_by_its_path(study, tmp_path):
    places = Places.below(tmp_path)
    done, _ = _play(study_grid(study()), _loss)
    _keep({name: summary for name, summary in done.items() if summary["row"] == "a-hosl"}, places)
    after = study_grid(study(base=STUDY["base"] | {"zo": {"directions": 3}}))
    with pytest.raises(FolderError, match=r"with zo.directions: 16, the study now says zo.directions: 3;"):
        read_summaries(after, places)


@pytest.mark.parametrize("said", ["[]", "{}", '{"row": "a-frozen"}', '"text"'])
def test_a_file_that_is_no_summary_is_refused_by_its_name(study, tmp_path, said):
    places = Places.below(tmp_path)
    places.summaries.mkdir()
    (places.summaries / "x.json").write_text(said)
    with pytest.raises(
        FolderError, match=r"x.json is not the summary of a run: it lacks rate, .*; remove it"
    ):
        read_summaries(study_grid(study()), places)


def test_a_summary_that_is_cut_short_is_made_again(study, tmp_path):
    places = Places.below(tmp_path)
    places.summaries.mkdir()
    (places.summaries / "x.json").write_text('{"row": "a-fro')
    assert read_summaries(study_grid(study()), places) == {}


@pytest.mark.parametrize(
    ("what", "where", "seed", "refused"),
    [
        ("task", "a", 4, True),
        ("task", "a", 5, True),  # the embedded task's rows do not depend on the seed
        ("task", "b", 4, False),  # another task
        ("model", "b", 5, True),
    ],
)
def test_runs_whose_data_or_model_changed_in_between_are_refused(study, tmp_path, what, where, seed, refused):
    places = Places.below(tmp_path)
    grid = study_grid(study(tasks={"a": {}, "b": {"task": {"kind": "docstrings", "max_tokens": 9}}}))
    done, _ = _play(grid, _loss)
    done["a-fo-fo-0.1-0.5-seed4"] |= {f"{what}_digest": "before"}
    changed = f"{where}-frozen-0-0.5-seed{seed}"
    done[changed] |= {f"{what}_digest": "after"}
    if not refused:
        assert run_grid(grid, places, done=done) == done
        return
    names = f"runs a-fo-fo-0.1-0.5-seed4 and {changed} name the same {what}"
    with pytest.raises(FolderError, match=re.escape(names)):
        run_grid(grid, places, done=done)


def test_data_that_the_seed_draws_may_differ_between_seeds_only(study, tmp_path):
    grid = study_grid(study(tasks={"a": {"task": {"kind": "docstrings", "train_rows": 100}}}))
    done, _ = _play(grid, _loss)
    for summary in done.values():
        summary["task_digest"] = f"of seed {summary['seed']}"
    places = Places.below(tmp_path)
    assert run_grid(grid, places, done=done) == done
    done["a-frozen-0-0.5-seed5"]["task_digest"] = "of other rows"
    with pytest.raises(FolderError, match="name the same task"):
        run_grid(grid, places, done=done)


def test_another_study_is_refused_in_a_folder_and_ones_own_may_move(tmp_path):
    for file in ("a.yaml", "elsewhere/a.yaml"):
        check_same_study(tmp_path, file)
    with pytest.raises(
        FolderError, match=r"the folder of study a.yaml, this is b.yaml, .* remove .*study.txt"
    ):
        check_same_study(tmp_path, "b.yaml")


def _begun_run(folder, config):
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    (folder / "config.yaml").write_text(dump_config(config))


def test_a_run_with_a_checkpoint_goes_on_and_one_without_is_begun_anew(study, tmp_path):
    config = study_grid(study()).needed({})[0].config("x")
    _begun_run(tmp_path / "run", config)
    assert begun(tmp_path / "run", config)
    (tmp_path / "run" / "checkpoints" / "step-00000004").rmdir()
    assert not begun(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("new_setting: 1", "whose settings this one does not know; choose another output_dir, or remove"),
        (None, "run cannot be gone on with: config .*: no such file; .*; remove that folder, or choose"),
    ],
)
def test_a_run_folder_that_cannot_be_read_says_what_to_do(study, tmp_path, text, said):
    config = study_grid(study()).needed({})[0].config("x")
    _begun_run(tmp_path / "run", config)
    (tmp_path / "run" / "config.yaml").unlink()
    if text is not None:
        (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(FolderError, match=said):
        begun(tmp_path / "run", config)


def test_what_a_kill_left_before_the_first_step_is_begun_anew(study, tmp_path):
    (run, *_) = study_grid(study()).needed({})
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("max_ste")
    assert not begun(folder, run.config("x"))
    assert not folder.exists()


def test_a_command_can_be_pasted_whatever_its_folder_is_called(study, tmp_path):
    (run, *_) = study_grid(study()).needed({})
    command = Places.below(Path("my runs/$HOME")).command(run)
    assert command == f"OMP_NUM_THREADS=1 hosl train 'my runs/$HOME/configs/{run.name}.yaml'"
