"""What is shown of a run: time left by a clock that the test holds, and texts that can be copied."""

from types import SimpleNamespace

import pytest

from hosl.study import run as study
from hosl.study.files import Places
from hosl.study.grid import Grid
from hosl.system.progress import Bar, Lines, Pace

RUNS = 112


@pytest.fixture
def clock(monkeypatch):
    """`clock.s` is what time it is."""
    held = SimpleNamespace(s=0.0)
    monkeypatch.setattr("hosl.system.progress.time", SimpleNamespace(monotonic=lambda: held.s))
    monkeypatch.setenv("COLUMNS", "200")
    return held


def at(clock, view, second, done, shown=None):
    clock.s = float(second)
    view.step(done, shown or {})


def test_nothing_is_left_to_say_before_one_is_done(clock):
    pace = Pace(3, RUNS)
    clock.s = 500.0
    assert pace.left_s() is None
    pace.reach(3)
    assert pace.left_s() is None
    pace.reach(4)
    assert pace.left_s() == 500 * (RUNS - 4)


def test_two_runs_that_end_together_do_not_halve_what_is_left(clock):
    """Two at a time, 100 s each, ending a second apart: 50 s each, however long ago the last one was."""
    pace = Pace(0, RUNS)
    for second, done in [(100, 1), (101, 2)]:
        clock.s = second
        pace.reach(done)
    assert pace.left_s() == 50.5 * 110
    clock.s = 140.0
    pace.reach(2)
    assert pace.left_s() == 50.5 * 110 - 39
    clock.s = 1000.0  # one that takes longer than those before is at its end all the while
    assert pace.left_s() == 50.5 * 109


def test_what_a_run_before_has_done_took_none_of_this_ones_time(clock):
    pace = Pace(100, RUNS)
    clock.s = 30.0
    pace.reach(101)
    assert pace.left_s() == 30 * 11


def test_a_client_that_goes_back_or_beyond_the_end_has_no_time_below_nothing(clock):
    pace = Pace(5, 10)
    clock.s = 1.0
    pace.reach(4)
    assert pace.left_s() is None
    pace.reach(12)
    assert pace.left_s() == 0


def test_a_bar_of_a_study_says_what_is_left(clock, capsys):
    with Bar("study runs/s", 0, RUNS) as bar:
        at(clock, bar, 100, 1)
        at(clock, bar, 101, 2)
        at(clock, bar, 140, 2)
    shown = capsys.readouterr().err
    assert "2/112" in shown
    assert "left 1:31:56" in shown


def test_a_bar_says_no_time_left_before_one_is_done(clock, capsys):
    with Bar("study runs/s", 0, RUNS) as bar:
        at(clock, bar, 100, 0)
    shown = capsys.readouterr().err
    assert "0/112" in shown
    assert "left" not in shown


def test_lines_name_what_they_count_and_say_what_is_left_once_one_is_done(clock, capsys):
    lines = Lines("study s", 0, RUNS, "run")
    at(clock, lines, 20, 0, {"at work": "a, b"})
    at(clock, lines, 100, 1, {"at work": "b, c"})
    at(clock, lines, 101, 2, {"at work": "c, d"})  # too soon for a line of its own
    at(clock, lines, 111, 2, {"at work": "c, d"})
    assert capsys.readouterr().err.splitlines() == [
        "study s  run 0/112  at work a, b",
        "study s  run 1/112  at work b, c  left 11100 s",
        "study s  run 2/112  at work c, d  left 5545 s",
    ]


def test_a_study_counts_runs(tmp_path, monkeypatch):
    units = []

    def opened(title, done, total, *, unit):
        units.append(unit)
        return Lines(title, done, total, unit)

    monkeypatch.setattr(study, "open_view", opened)
    study.run_grid(Grid((), (0,)), Places.below(tmp_path), done={})
    assert units == ["run"]


@pytest.mark.parametrize("view", [Bar("hosl", 0, 10), Lines("hosl", 0, 10, "step")])
def test_what_is_said_can_be_copied(view, capsys):
    command = "go on with: hosl train --resume " + "runs/[a]/[/b]/:art:/" * 20
    view.say(command)
    assert capsys.readouterr().err == command + "\n"


@pytest.mark.usefixtures("clock")
def test_a_bar_shows_brackets_as_they_are(capsys):
    with Bar("study runs/[a]/[/b]", 0, 10) as bar:
        bar.step(1, {"at work": "[c]"})
    shown = capsys.readouterr().err
    assert "study runs/[a]/[/b]" in shown
    assert "at work [c]" in shown
