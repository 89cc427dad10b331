"""`task.metric`: a function of the user's own over the answers of a tuned model, those that `hosl predict` writes."""

import json
import sys

import pytest
import yaml

from hosl.cli import main
from tests.integration.languages import language_model
from tests.integration.test_predict_answers import answers, lines, sft, write

METRICS = """
import json, pathlib
def shared(answers, references):
    assert all(isinstance(text, str) for text in (*answers, *references))
    pathlib.Path("judged.json").write_text(json.dumps([answers, references]))
    return {"length": sum(map(len, answers)) / len(answers), "rows": len(references)}
def count(answers, references):
    return len(answers)
def broken(answers, references):
    raise KeyError("no such word\\nsecond line")
def words(answers, references):
    return "many"
def nan(answers, references):
    return float("nan")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return language_model(tmp_path_factory.mktemp("model") / "model", "llama")


@pytest.fixture
def config(tmp_path, model, monkeypatch):
    """`config(metric, **task)`: the path of a config beside a module of metrics, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics_here.py").write_text(METRICS)
    monkeypatch.delitem(sys.modules, "metrics_here", raising=False)

    def made(metric, **settings):
        rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(40)]
        task = {
            "kind": "sft", "train": str(write(tmp_path / "rows.jsonl", rows)), "max_tokens": 32, "metric": metric,
            "metric_tokens": 3,
        }  # fmt: skip
        path = sft(tmp_path, model)
        content = yaml.safe_load(path.read_text())
        path.write_text(json.dumps(content | {"task": task} | settings))
        return path

    return made


def test_the_figures_are_those_of_the_answers_that_predict_writes(config, tmp_path, capsys):
    summary, err = answers(capsys, "train", config("metrics_here:shared"))
    assert "task.metric: metrics_here:shared will judge the answers to 50 held-out rows at most" in err
    judged, references = json.loads((tmp_path / "judged.json").read_text())
    held_out = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    asked = [next(row for row in held_out if row["completion"] == wanted) for wanted in references]
    write(tmp_path / "asked.jsonl", asked)
    out = tmp_path / "out.jsonl"
    answers(capsys, "predict", tmp_path / "run", tmp_path / "asked.jsonl", "-o", out, "--max-new-tokens", "3")
    assert [(row["answer"], row["wanted"]) for row in lines(out)] == list(
        zip(judged, references, strict=True)
    )
    assert summary["own_rows"] == len(judged) == 4  # a tenth of the rows
    assert summary["own_length"] == sum(map(len, judged)) / len(judged)
    kept = json.loads((tmp_path / "run" / "own_metric.json").read_text())
    assert kept == {"rows": len(judged), "figures": {"length": summary["own_length"], "rows": len(judged)}}
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"length of the answers to {len(judged)} rows" in page
    assert "Loss and tokens right" in page  # where texts are learned nothing is called accuracy
    assert "accuracy" not in page.lower().partition("make it again")[0].partition("<body")[2]
    again, _ = answers(capsys, "eval", tmp_path / "run", "--split", "test")
    assert again["own_length"] == summary["own_length"]


def test_no_more_rows_are_answered_than_metric_rows(config, capsys):
    path = config("metrics_here:count")
    summary, _ = answers(capsys, "train", path, "--task.metric-rows", "2")
    assert summary["own_count"] == 2.0


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (
            "metrics_here",
            "task.metric must be module:function, such as my_metrics:exact_match, got 'metrics_here'",
        ),
        (
            "no_such_module:f",
            "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("metrics_here:f", "has no function f; write one of two lists of texts"),
        ("sys:nothing", "task.metric: sys:nothing: sys has no function nothing"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_before_the_run(config, tmp_path, capsys, metric, said):
    assert main(["train", str(config(metric))]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("broken", "failed on 4 answers: KeyError: 'no such word"),
        ("words", "returned 'many'; it must be a number"),
        ("nan", "returned nan; it must be a number"),
    ],
)
def test_a_metric_that_fails_costs_the_figure_and_not_the_run(config, tmp_path, capsys, metric, said):
    assert main(["train", str(config(f"metrics_here:{metric}"))]) == 1
    out, err = capsys.readouterr()
    assert "finished: True" in out
    assert said in err
    assert "Traceback" not in err
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "own_metric.json").exists()


def test_texts_have_no_answers_to_judge(config, tmp_path, capsys):
    path = config("metrics_here:count")
    write(tmp_path / "rows.jsonl", [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(40)])
    assert main(["train", str(path)]) == 2
    assert "task.metric judges answers" in capsys.readouterr().err


def test_a_joined_run_says_the_way_that_works(config, tmp_path, model, capsys):
    assert main(["split", str(model), "--cut", "1", str(tmp_path / "halves")]) == 0
    line = "hosl://127.0.0.1:1#" + "A" * 43 + "." + "B" * 43
    command = [
        "join",
        str(tmp_path / "halves" / "client"),
        "--to",
        line,
        "--config",
        str(config("metrics_here:count")),
    ]
    assert main(command) == 2
    assert (
        "task.metric: metrics_here:count judges answers, which `hosl train` has at its end"
        in capsys.readouterr().err
    )
