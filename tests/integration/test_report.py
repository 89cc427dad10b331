"""`hosl report` over runs that were trained, and its page looked at in a real browser."""

import json
import re

import pytest

from hosl.cli import main
from hosl.system.run_folder import read_lines
from tests.integration.browser import browse, needs_chromium

PAGE_WHITE, PAGE_DARK = (255, 255, 255), (17, 22, 28)


@pytest.fixture
def two_runs(tiny_run, tmp_path):
    """Folders of a frozen and a zeroth-order run."""
    config = str(tiny_run())
    for method in ("frozen", "hosl"):
        assert main(["train", config, "--method", method, "--output-dir", str(tmp_path / method)]) == 0
    return tmp_path / "frozen", tmp_path / "hosl"


def test_two_runs_stand_side_by_side_with_planned_lines(two_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["report", *map(str, two_runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "report.html"}
    page = (tmp_path / "report.html").read_text()
    assert "2 ways to train on data" in page
    assert "Lines: planned for the longest batch" in page
    assert re.search(r">fo-fo</text>", page)  # no run is of it: the planner's line
    for run in two_runs:
        assert f"hosl train {run}/config.yaml" in page


def test_a_trained_run_knows_its_verbs_and_its_longest_batch(two_runs):
    _, run = two_runs
    line = read_lines(run / "timings.jsonl")[3]
    assert list(line["client_calls_s"]) == ["probes", "forward", "descend"]
    assert list(line["server_calls_s"]) == ["losses", "step"]
    for party in ("client", "server"):
        assert sum(line[f"{party}_calls_s"].values()) == pytest.approx(line[f"{party}_s"], abs=1e-5)
    record = json.loads((run / "record.json").read_text())
    assert record["longest_batch"] == {"rows": 8, "tokens": 2}
    page = (run / "report.html").read_text()
    assert "losses of the probes" in page
    assert "plain backprop would take" in page


def test_a_page_whose_model_is_gone_keeps_its_measured_points(two_runs, tmp_path):
    (tmp_path / "model-in").rename(tmp_path / "gone")
    assert main(["report", str(two_runs[1])]) == 0
    page = (two_runs[1] / "report.html").read_text()
    assert "planned for the longest batch" not in page
    assert "losses of the probes" in page


def test_what_is_no_run_is_one_line_and_status_two(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is no run's folder: it lacks metrics.jsonl" in err
    assert err.count("\n") == 1


@needs_chromium
def test_a_page_is_readable_in_light_and_in_dark(two_runs, tmp_path):
    from PIL import Image

    page = tmp_path / "page.html"
    assert main(["report", *map(str, two_runs), "-o", str(page)]) == 0
    for scheme, background in ((1, PAGE_WHITE), (0, PAGE_DARK)):
        picture = tmp_path / f"{scheme}.png"
        browse(
            tmp_path / f"profile{scheme}", page.as_uri(), "--window-size=1000,2600", "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
        )  # fmt: skip
        with Image.open(picture) as image:
            colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
            pixels = image.width * image.height
        assert max(colours, key=colours.__getitem__) == background
        assert 0.5 < colours[background] / pixels < 0.99  # neither blank nor covered
        ink = [c for c in colours if sum(abs(a - b) for a, b in zip(c, background, strict=True)) > 450]
        assert ink  # text and curves stand out from the page, whichever it is
