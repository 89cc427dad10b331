"""A run whose files were damaged is named by `hosl report` in one line: no traceback, and no page that says less."""

import json

import pytest
import yaml

from hosl.cli import main
from tests.unit import test_report

made = test_report.made


def _lines(run, name, change, at):
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    change(lines[at])
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _refused(words, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


STEP = ("loss_nats", "bytes_up", "bytes_down")
SCORES = ("accuracy", "loss_nats", "examples")
COSTS = ("step_s", "client_s", "server_s", "client_peak_bytes", "server_peak_bytes")


@pytest.mark.parametrize(
    ("name", "at", "keys"),
    [
        ("metrics.jsonl", 0, STEP), ("metrics.jsonl", 3, SCORES), ("metrics.jsonl", -1, SCORES),
        ("timings.jsonl", 2, COSTS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["0.5", None, [1], True, -1e400, "renamed"], ids=str)
def test_a_line_with_another_key_or_a_value_of_another_type_is_named(
    made, tmp_path, capsys, name, at, keys, value
):
    for number, key in enumerate(keys):
        run = made(f"r{number}")

        def change(line, key=key):
            line[f"{key}x"], line[key] = line[key], value
            if value == "renamed":
                del line[key]

        _lines(run, name, change, at)
        if value == -1e400:  # JSON has no infinity: such a line is none, and left out as torn ones are
            assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
            continue
        whole = made(f"w{number}", "frozen")
        for words in ([str(run)], [str(whole), str(run), "-o", str(tmp_path / "page.html")]):
            said = _refused(["report", *words], capsys)
            assert f"{run / name}, line {at % (9 if name[0] == 'm' else 6) + 1}, is damaged" in said
            assert f"`{key}`" in said or f"$.{key}" in said
        assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", "", "null", "\0\0", '{"labels": ["a"]}', '{"labels": [1], "confusion": [[1]]}',
        '{"labels": ["a"], "confusion": [["x"]]}', '{"labels": ["a", "b"], "confusion": [[1, 2], [3]]}',
        '{"labels": ["a", "b"], "confusion": [[1, 2]]}', '{"labels": ["a"], "confusion": [[-1]]}',
    ],
)  # fmt: skip
def test_a_damaged_evaluation_is_named(made, capsys, content):
    run = made("a")
    (run / "evaluation.json").write_text(content)
    assert f"{run}/evaluation.json is damaged" in _refused(["report", str(run)], capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.pop("task"), "`task`"), (lambda record: record.update(cut="2"), "$.cut"),
        (lambda record: record["model"].pop("source"), "`source`"),
        (lambda record: record.update(versions=3), "$.versions"),
        (lambda record: record["task"].update(name=None), "$.task.name"),
        (lambda record: record["machine"].update(cores="2"), "$.machine.cores"),
    ],
)  # fmt: skip
def test_a_record_with_other_keys_or_types_is_named(made, capsys, change, said):
    run = made("a")
    record = json.loads((run / "record.json").read_text())
    change(record)
    (run / "record.json").write_text(json.dumps(record))
    line = _refused(["report", str(run)], capsys)
    assert f"{run}/record.json is damaged" in line
    assert said in line


@pytest.mark.parametrize("content", ["", "\n", "[1]", "a: 1\n", "method: hosl\nzo: {law2: 1}\n"])
def test_a_config_that_lost_its_content_is_named_and_not_taken_for_a_run_that_has_not_begun(
    made, capsys, content
):
    run = made("a")
    (run / "config.yaml").write_text(content)
    line = _refused(["report", str(run)], capsys)
    assert str(run / "config.yaml") in line
    assert "begun yet" not in line


def test_a_config_of_another_version_is_still_shown(made):
    run = made("a")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"a_setting_of_then": 3}))
    assert main(["report", str(run)]) == 0
    assert "a_setting_of_then" in (run / "report.html").read_text()


def test_a_run_that_lost_a_file_is_a_run_and_told_what_it_lost(made, capsys):
    for name in ("timings.jsonl", "metrics.jsonl"):
        run = made(name)
        (run / name).unlink()
        line = _refused(["report", str(run)], capsys)
        assert f"{run} is a run's folder that lacks {name}" in line
        assert "no run's folder" not in line
    run = made("empty")
    (run / "timings.jsonl").write_text("")
    assert main(["report", str(run)]) == 0  # as the line says


def test_a_run_whose_metrics_are_empty_beside_its_checkpoints_is_no_run_of_zero_steps(made, capsys):
    run = made("a")
    (run / "metrics.jsonl").write_text("")
    assert main(["report", str(run)]) == 0  # none was made yet
    (run / "checkpoints" / "step-00000006").mkdir(parents=True)
    capsys.readouterr()
    line = _refused(["report", str(run)], capsys)
    assert "metrics.jsonl has no line, but the run has a checkpoint of step 6" in line


def test_a_group_whose_dev_lines_were_lost_is_compared_without_them(made, tmp_path):
    runs = [made(f"{method}{seed}", method, seed=seed) for method in ("frozen", "fo-fo") for seed in (0, 1)]
    for run in runs:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if '"dev"' not in line))
    assert main(["report", *map(str, runs), "-o", str(tmp_path / "page.html")]) == 0
