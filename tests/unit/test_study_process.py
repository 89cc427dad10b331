"""How one run of a study ends: with a summary, by diverging, by a signal; and a run without its study."""

import json

import pytest

from hosl.errors import FailureError, RequestError
from hosl.study import process as study_process
from hosl.study.config import study_grid
from hosl.study.files import Places
from hosl.study.process import RunProcess, make_alone
from tests.unit import test_study

study = test_study.study


@pytest.fixture
def ended(study, tmp_path, monkeypatch):
    """`ended(status, out, err)`: a run's process that has ended; its log holds an attempt that diverged."""

    class Process:
        stdin = None

        def __init__(self, status):
            self.returncode = status

    def make(status, out="", err=""):
        (run, *_), places = study_grid(study()).needed({}), Places.below(tmp_path)
        places.runs.mkdir()
        (places.runs / f"{run.name}.log").write_text("hosl: the loss is nan; it must be finite: lower it\n")

        def play(words, *, out, err):
            out.write(said[0].encode())
            err.write(said[1].encode())
            return Process(status)

        said = (out, err)
        monkeypatch.setattr(study_process, "_hosl_train", play)
        process = RunProcess(run, places)
        folder = places.run_folder(run)
        folder.mkdir()
        facts = {"versions": {}, "task": {"digest": "of rows"}, "model": {"digest": "of weights"}}
        (folder / "record.json").write_text(json.dumps(facts))
        (folder / "metrics.jsonl").touch()
        return process

    return make


def test_a_summary_is_the_last_line_that_a_run_says_and_knows_its_data(ended):
    summary = ended(0, out='a library says hello\n{"dev_loss_nats": 0.5}\n').take()
    assert summary["dev_loss_nats"] == 0.5
    assert (summary["task_digest"], summary["model_digest"]) == ("of rows", "of weights")


def test_what_an_earlier_attempt_said_is_not_said_again(ended):
    with pytest.raises(FailureError, match=r"failed: RuntimeError: no; all it said"):
        ended(1, err="Traceback (most recent call last):\nRuntimeError: no\n").take()


def test_a_run_that_a_signal_ended_is_not_a_run_that_diverged(ended):
    with pytest.raises(FailureError, match=r"was ended by signal 9 .*perhaps memory ran out: lower at_once"):
        ended(-9).take()


def test_a_run_that_diverges_is_recorded(ended):
    said = {"kind": "NonFiniteError", "message": "the loss is inf"}
    assert ended(3, out=json.dumps({"error": said})).take()["diverged"] == "the loss is inf"


def test_a_run_that_fails_otherwise_says_what_it_printed(ended):
    said = {
        "kind": "SplitError",
        "message": "the loss is nan; it must be finite",
    }  # words that once meant divergence
    with pytest.raises(RequestError, match=r"failed: the loss is nan; it must be finite; all it said"):
        ended(2, out=json.dumps({"error": said})).take()


@pytest.mark.parametrize(
    ("child", "status"),
    [
        ("import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)", 130),
        ("import os, sys\nsys.exit(7 if os.environ['OMP_NUM_THREADS'] == '1' else 0)", 7),
    ],
)
def test_a_run_alone_is_one_thread_that_stops_when_asked(study, monkeypatch, child, status):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(study_process, "_HOSL", child)
    assert make_alone(study_grid(study()).needed({})[0].config("x"), as_json=False) == status


def test_a_run_alone_that_a_signal_ended_says_so(study, monkeypatch):
    monkeypatch.setattr(study_process, "_HOSL", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(FailureError, match="the run was ended by signal 9"):
        make_alone(study_grid(study()).needed({})[0].config("x"), as_json=False)
