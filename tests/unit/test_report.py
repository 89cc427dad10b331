"""A report's groups, labels, numbers and page, from the files of runs that nobody had to train."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
import yaml

from hosl.cli import main
from hosl.config import parse_config
from hosl.errors import ConfigError, FolderError
from hosl.report.build import write_comparison, write_report
from hosl.report.costs import step_parts
from hosl.report.groups import PlannedLine, by_task_and_model
from hosl.report.runs import read_run, run_folders
from hosl.report.statistics import NoGap
from hosl.report.tables import Cell, compared
from hosl.study.grid import merged

CALLS = {
    "frozen": (["forward"], ["step"]),
    "hosl": (["probes", "forward", "descend"], ["losses", "step"]),
    "hosl-node": (["forward_keeping_inputs", "guide", "slope", "node_slopes", "descend_nodes"], ["step"]),
    "fo-fo": (["forward_for_backward", "backward"], ["step"]),
    "fo-recompute": (["forward", "backward"], ["step"]),
}
REACHED = {"frozen": 0.5, "hosl": 0.55, "hosl-node": 0.6, "fo-fo": 0.8, "fo-recompute": 0.8}


@pytest.fixture
def made(tmp_path):
    """`made(name, method, **settings)` writes the folder of a finished run and returns it."""

    def make(name, method="hosl", *, steps=6, finished=True, record=None, calls=True, **settings):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = merged({"method": method, "max_steps": 6, "output_dir": str(folder)}, settings)
        config = msgspec.to_builtins(parse_config(config, where=name))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        facts = {
            "versions": {"python": "3.11", "hosl": "0.1.0", "machine": "Linux"},
            "machine": {"system": "Linux", "processor": "A <fast> one", "cores": 2},
            "model": {"source": "tiny", "digest": "d", "family": "bert"},
            "task": {"name": config["task"]["kind"], "digest": "t"},
            "cut": config["model"]["cut"], "trained_parameters": {"client": 12345, "server": 67},
        }  # fmt: skip
        (folder / "record.json").write_text(json.dumps(facts | (record or {})))
        _write_lines(folder, config, steps, finished, calls)
        return folder

    return make


def _write_lines(folder, config, steps, finished, calls):
    of_client, of_server = CALLS[config["method"]]
    seed, metrics, timings = config["seed"], [], []
    for step in range(1, steps + 1):
        metrics.append({
            "step": step, "loss_nats": 2 / step + 0.01 * seed, "bytes_up": 2**20, "bytes_down": 4,
        })  # fmt: skip
        line = {
            "step": step, "step_s": 1.0, "client_s": 0.6, "server_s": 0.3, "server_peak_bytes": 2**20,
            "client_peak_bytes": (2 if config["method"] == "fo-fo" else 1) * config["model"]["cut"] * 2**24,
        }  # fmt: skip
        if calls:
            line["client_calls_s"] = {call: 0.6 / len(of_client) for call in of_client}
            line["server_calls_s"] = {call: 0.3 / len(of_server) for call in of_server}
        timings.append(line)
        if step % 3 == 0:
            metrics.append(_evaluation("dev", step, config))
    if finished:
        metrics.append(_evaluation("test", steps, config))
    for name, lines in (("metrics.jsonl", metrics), ("timings.jsonl", timings)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _evaluation(split, step, config):
    accuracy = REACHED[config["method"]] + 0.01 * config["seed"]
    found = {"accuracy": accuracy, "f1_macro": accuracy, "loss_nats": 1 - accuracy, "examples": 100}
    return {"step": step, "split": split, **found}


def _groups(*folders):
    (part,) = by_task_and_model(read_run(folder) for folder in folders)
    return part.groups


def test_runs_that_differ_by_seed_and_folder_are_one_group(made):
    groups = _groups(made("a", seed=2), made("b", seed=0), made("c", "frozen"))
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("frozen", [0]), ("hosl", [0, 2]),
    ]  # fmt: skip


def test_a_label_says_the_method_and_only_what_tells_groups_apart(made):
    at_rate = {rate: {"client": {"learning_rate": rate}} for rate in (0.01, 0.03)}
    groups = _groups(
        made("a", "hosl-node", **at_rate[0.01]), made("b", "hosl-node", **at_rate[0.03]), made("c", "fo-fo")
    )
    assert [g.label for g in groups] == [
        "hosl-node, client rate 0.01",
        "hosl-node, client rate 0.03",
        "fo-fo",
    ]
    groups = _groups(
        made("d", "hosl-node", model={"cut": 3}, **at_rate[0.01]),
        made("e", "hosl-node", model={"cut": 6}, **at_rate[0.03]),
    )
    assert [group.label for group in groups] == ["hosl-node, cut 3", "hosl-node, cut 6"]
    assert {group.way for group in groups} == {"hosl-node"}


def test_a_label_does_not_say_what_most_have(made):
    kinds = [
        {},
        {"epsilon": 1e-2},
        {"server_gradient_at": "first-plus"},
        {"epsilon": 1e-2, "server_gradient_at": "first-plus"},
        {"epsilon": 1e-4},
    ]
    groups = _groups(*(made(f"r{place}", zo={"directions": 2} | zo) for place, zo in enumerate(kinds)))
    assert [group.label for group in groups] == [
        "hosl, epsilon 0.001", "hosl, epsilon 0.01", "hosl, epsilon 0.001, server gradient at first-plus",
        "hosl, epsilon 0.01, server gradient at first-plus", "hosl, epsilon 0.0001",
    ]  # fmt: skip
    groups = _groups(*(made(f"s{place}", zo={"directions": 2} | zo) for place, zo in enumerate(kinds[:3])))
    assert [group.label for group in groups] == [
        "hosl",
        "hosl, epsilon 0.01",
        "hosl, server gradient at first-plus",
    ]


def test_a_rate_that_is_left_out_is_the_usual_one(made):
    usual = parse_config({"method": "hosl"}, where="here").client_rate
    assert len(_groups(made("a"), made("b", seed=1, client={"learning_rate": usual}))) == 1


def test_other_tasks_and_other_models_stand_apart(made):
    words = {"kind": "files", "train": "words.csv"}
    folders = [made("a"), made("b", task=words), made("c", record={"model": {"digest": "e"} | MODEL})]
    assert len(by_task_and_model(read_run(folder) for folder in folders)) == 3


MODEL = {"source": "other", "family": "bert"}


def test_a_seed_that_ran_twice_is_one_run_whichever_is_named_last(made, tmp_path):
    old, new = made("old", seed=5), made("new", seed=5)
    begun = made("begun", seed=5, steps=3, finished=False)
    for day, folder in enumerate((old, new, begun)):
        os.utime(folder / "config.yaml", (86400 * day, 86400 * day))
    for named in ((old, new, begun), (begun, new, old)):
        (group,) = _groups(*named)
        assert [run.folder for run in group.runs] == [new]
    assert [run.folder for run in _groups(old, begun)[0].runs] == [old]  # an unfinished one has no test
    text = _checked(write_comparison([old, new, begun], tmp_path / "page.html"))
    assert "2 left out" in text
    assert "<b>1</b>run in 1 group<" in text
    assert text.count("<code>hosl train") == 1


def test_a_folder_that_is_named_twice_is_one_run(made, tmp_path, monkeypatch):
    run = made("a")
    monkeypatch.chdir(tmp_path)
    assert run_folders([Path("runs/a"), run, Path("runs/../runs/a")]) == [Path("runs/a")]


def test_runs_of_changed_data_stand_apart_and_say_so(made, tmp_path):
    def of(digest):
        return {"task": {"name": "docstrings", "digest": digest}}

    folders = [made(f"{d}{s}", seed=s, record=of(d * 9)) for d in "AB" for s in (0, 1)]
    text = _checked(write_comparison(folders, tmp_path / "page.html"))
    assert text.count("docstrings, tiny (bert), data with digest") == 2
    longer = made("longer", record=of("C"), task={"kind": "docstrings", "max_tokens": 128})
    assert len(by_task_and_model(map(read_run, [*folders[:2], longer]))) == 1  # max_tokens changes the digest
    few = {"kind": "docstrings", "train_rows": 50}
    drawn = [made(f"drawn{s}", seed=s, record=of(f"D{s}"), task=few) for s in (0, 1)]
    assert len(by_task_and_model(map(read_run, drawn))) == 1  # so does a seed that draws the rows


def test_gap_closure_stands_where_both_ends_share_two_seeds(made):
    def cells(*folders):
        (part,) = by_task_and_model(read_run(folder) for folder in folders)
        table = compared(part.comparison())
        return [dict(zip(table.head, line, strict=True)) for line in table.lines], part.comparison()

    ends = [made(f"{m}{s}", m, seed=s) for m in ("frozen", "fo-fo") for s in (0, 1)]
    (_, node, _), _ = cells(*ends, made("a", "hosl-node", seed=0), made("b", "hosl-node", seed=1))
    assert node["G (accuracy)"] == Cell("0.33", "[0.33, 0.33]")  # (0.6 - 0.5) / (0.8 - 0.5)
    (frozen, *_), comparison = cells(*ends[:2], made("c", "hosl-node", seed=2), made("d", "fo-fo", seed=2))
    assert frozen["G (accuracy)"] == Cell("n/a", "(under two seeds in common)")
    longer = {"max_steps": 7}  # what had more steps is no end of a scale
    _, comparison = cells(*ends[:2], made("e", "fo-fo", **longer), made("f", "fo-fo", seed=1, **longer))
    assert comparison.reasons == [NoGap.FIRST_ORDER_OTHER_WORK, NoGap.OTHER_WORK]
    (frozen, *_), comparison = cells(*ends[:2])
    assert comparison.reasons == [NoGap.NO_FIRST_ORDER]
    assert "G (accuracy)" not in frozen  # the note says why


def test_a_page_without_a_frozen_row_says_that_there_is_no_gap_closure(made, tmp_path):
    text = _checked(write_comparison([made("a"), made("b", "fo-fo")], tmp_path / "page.html"))
    assert "no gap closure. With more there would be none either: no frozen row." in text
    text = _checked(write_comparison([made("c", seed=1), made("d", seed=2)], tmp_path / "page.html"))
    assert "No gap closure: no frozen row." in text


def test_a_step_is_told_in_the_order_in_which_it_happens(made):
    (group,) = _groups(made("a"))
    parts = [(part.party, part.name, round(part.seconds, 3)) for part in step_parts(group)]
    assert parts == [
        ("client", "probes", 0.2), ("server", "losses of the probes", 0.15), ("client", "forward", 0.2),
        ("server", "forward, backward, update", 0.15), ("client", "update along directions", 0.2),
        ("rest", "drawing the batch, bookkeeping", 0.1),
    ]  # fmt: skip
    (group,) = _groups(made("b", calls=False))
    assert [(part.party, round(part.seconds, 3)) for part in step_parts(group)] == [
        ("client", 0.6), ("server", 0.3), ("rest", 0.1),
    ]  # fmt: skip


def _planner(part):
    methods = part.methods | {"fo-fo": "fo-fo"}
    return [PlannedLine(way, method, {1: 2.0**24, 3: 2.0**25}) for way, method in methods.items()]


def _checked(page):
    """The page, after what every page must hold."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|<img", text)
    for place in re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", text):
        assert "".join(place).startswith("#")
    ids = Counter(re.findall(r' id="([^"]*)"', text))
    assert not [name for name, count in ids.items() if count > 1]
    assert {name[1:] for name in re.findall(r"(?<=[(\"])#[\w.-]+", text)} <= set(ids)
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(drawing)
    assert "#0101" not in text
    assert list(page.parent.glob(".*partial")) == []
    return text


def _headings(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


COSTS = ["Client memory against the cut", "Bytes of a step", "A step from start to end"]


def test_a_page_of_one_run_has_every_section_that_one_run_can_fill(made):
    run = made("a", "hosl-node")
    text = _checked(write_report(run, planner=_planner))
    assert _headings(text) == [
        "Loss and accuracy", *COSTS, "Evaluations", "Make it again", "Settings that are not at their defaults",
        "Versions and machine", "In full",
    ]  # fmt: skip
    assert text.count('<svg viewBox="0 0') == 2 + text.count('class="key"')
    assert f"<code>hosl train {run}/config.yaml</code>" in text
    assert "12,345 on the client and 67 on the server" in text
    assert "A &lt;fast&gt; one, 2 cores" in text
    assert "60.00 %" in text
    assert len(text) < 300_000
    assert COSTS[0] not in _headings(_checked(write_report(run)))  # one point and no line are no picture


def test_a_page_of_many_runs_has_every_section(made, tmp_path):
    folders = [
        made(f"{method}-{cut}-{seed}", method, seed=seed, model={"cut": cut})
        for method in ("frozen", "hosl-node", "fo-fo")
        for cut in (2, 3)
        for seed in (0, 1)
    ]
    text = _checked(write_comparison(folders, tmp_path / "page.html", planner=_planner))
    assert _headings(text) == [
        "What they reach and cost", "Accuracy against client memory", "Loss and accuracy", *COSTS, "Where they differ",
        "Evaluations", "Make them again", "Versions and machines",
    ]  # fmt: skip
    assert text.count("<code>hosl train") == 12
    assert "3 ways to train on docstrings with tiny (bert)" in text
    assert "the client has the first 2 or 3 blocks; 6 steps of 16 examples; seeds 0 and 1" in text


def test_runs_of_several_tasks_have_pictures_of_their_own(made, tmp_path):
    words = {"kind": "files", "train": "words.csv"}
    folders = [
        made(f"{m}{n}", m, **({"task": words} if n else {})) for m in ("frozen", "hosl") for n in (0, 1)
    ]
    text = _checked(write_comparison(folders, tmp_path / "page.html"))
    assert _headings(text).count("Accuracy against client memory") == 2


def test_names_are_text_wherever_they_stand(made, tmp_path):
    odd = {
        "task": {"name": "<i>$x_$", "digest": "t"},
        "model": {"source": "<b>&", "digest": "d", "family": "bert"},
    }
    lora = {"client": {"trainable": "lora", "lora": {"target_modules": ["$q<k"]}}}
    folders = [made("a", record=odd), made("b", record=odd, **lora), made("c", "fo-fo", record=odd)]
    for page in (
        write_report(folders[1]),
        write_comparison(folders, tmp_path / "page.html", planner=_planner),
    ):
        text = _checked(page)
        assert "&lt;i&gt;$x_$" in text
        assert not re.search("<i>|<b>&|q<k", text)


def test_settings_are_told_beside_the_defaults_of_their_own_kind_of_task(made):
    task = {"kind": "files", "train": "rows.csv", "label_column": "intent"}
    text = _checked(write_report(made("a", task=task)))
    rows = re.findall(r"<tr><td>(task\.\w+)</td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert rows == [
        ("task.kind", "files", "docstrings"), ("task.train", "rows.csv", ""), ("task.label_column", "intent", "label"),
    ]  # fmt: skip


def test_names_of_settings_versions_and_verbs_are_text(made, tmp_path):
    folders = [made(name, record={"versions": {"<i>v": name, "machine": "L"}}) for name in ("a", "b")]
    for folder in folders:  # of a version with other settings and calls
        with (folder / "config.yaml").open("a") as file:
            file.write(f"<i>new: {folder.name}\n")
        timings = (folder / "timings.jsonl").read_text()
        (folder / "timings.jsonl").write_text(timings.replace('"probes"', '"<i>call"'))
    for page in (write_report(folders[0]), write_comparison(folders, tmp_path / "page.html")):
        text = _checked(page)
        assert "<i>" not in text
        assert all(f"&lt;i&gt;{name}" in text for name in ("new", "v", "call"))


def test_a_run_on_one_thread_is_made_again_on_one(made):
    one = made("one", finished=False, record={"machine": {"system": "Linux", "threads": 1}})
    (one / "checkpoints").mkdir()
    text = _checked(write_report(one))
    assert f"<code>OMP_NUM_THREADS=1 hosl train {one}/config.yaml</code>" in text
    assert f"<code>OMP_NUM_THREADS=1 hosl train --resume {one}</code>" in text
    two = made("two", record={"machine": {"system": "Linux", "threads": 2}})
    assert f"<code>hosl train {two}/config.yaml</code>" in _checked(write_report(two))


def test_a_page_without_matplotlib_keeps_its_tables(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folders = [made("a"), made("b", "frozen")]
    for page in (write_report(folders[0]), write_comparison(folders, tmp_path / "page.html")):
        text = _checked(page)
        assert "matplotlib is not installed" in text
        assert "A step from start to end" in text
        assert 'class="picture"' not in text


def test_without_the_extra_a_run_ends_with_a_line_and_a_page_that_is_asked_for_is_refused(
    made, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    run = made("a")
    assert write_report(run) is None  # a device that has no use for pages has finished its run all the same
    said = f"report.html was not written: pip install 'hosl[report]', then hosl report {run}\n"
    assert capsys.readouterr().err == said
    assert not (run / "report.html").exists()
    assert main(["report", str(run)]) == 2
    assert "reports need jinja2: pip install 'hosl[report]'" in capsys.readouterr().err


def test_a_comparison_without_jinja_is_refused_before_anything_is_read(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"reports need jinja2: pip install 'hosl\[report\]'"):
        write_comparison([made("a"), made("b", "frozen")], tmp_path / "page.html")


def test_a_run_that_stopped_is_shown_as_far_as_it_came(made, tmp_path):
    stopped, empty = made("a", steps=4, finished=False), made("b", "fo-fo", steps=0, finished=False)
    assert "stopped after 4 of 6 steps" in _checked(write_report(stopped))
    assert "No step was made" in _checked(write_report(empty))
    text = _checked(write_comparison([stopped, empty, made("c", "frozen")], tmp_path / "page.html"))
    assert text.count("<small>1 unfinished</small>") == 2


def test_a_joined_run_under_way_gets_no_page_where_join_would_take_it_for_finished(made, tmp_path):
    run = made("a", finished=False, record={"run_id": "x"})
    with pytest.raises(FolderError, match="is under way"):
        write_report(run)
    assert "hosl join tiny --to JOIN_LINE --config" in _checked(write_report(run, out=tmp_path / "page.html"))


def test_what_is_no_run_is_refused_with_what_was_found(made, tmp_path):
    run = made("a")
    (run / "record.json").unlink()
    with pytest.raises(FolderError, match=r"lacks record\.json and holds config\.yaml, metrics\.jsonl"):
        write_report(run)
    with pytest.raises(FolderError, match="it does not exist; a report wants folders"):
        write_comparison([tmp_path / "nothing"], tmp_path / "page.html")
    with pytest.raises(FolderError, match="it is a file"):
        write_report(run / "config.yaml")
    (run / "record.json").write_text('{"run_id": "x"}')
    with pytest.raises(FolderError, match="has not begun yet"):
        write_report(run)
    (run / "record.json").write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        write_report(run)


def test_a_page_that_cannot_be_written_leaves_nothing_behind(made, tmp_path):
    with pytest.raises(FolderError, match="cannot be written: No such file or directory"):
        write_report(made("a"), out=tmp_path / "nowhere" / "page.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FolderError, match="cannot be written: Is a directory"):
        write_report(made("b"), out=tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "taken"]


def test_a_report_needs_no_torch_and_its_extra_only_when_it_is_made():
    script = "import sys, hosl.report.build, hosl.report.planned; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "jinja2", "scipy", "matplotlib"} & set(ran.stdout.split())


def test_a_page_is_the_same_bytes_again(made, tmp_path):
    folders = [made("a"), made("b", "frozen")]
    first = write_comparison(folders, tmp_path / "page.html", planner=_planner).read_bytes()
    assert Path(write_comparison(folders, tmp_path / "page.html", planner=_planner)).read_bytes() == first
