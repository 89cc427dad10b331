"""A report's pictures: what their axes show, how ways to train are told apart, labels beside points, amounts."""

import itertools
import json

import pytest

from hosl.report import figures as report_pictures
from hosl.report.build import write_comparison, write_report
from hosl.report.labels import Label, spread_apart
from hosl.report.style import looks
from hosl.system.readable import readable_bytes, readable_count, readable_seconds
from tests.unit import test_report

made = test_report.made


@pytest.fixture
def limits(made, tmp_path, monkeypatch):
    """`limits(losses of steps, losses on dev)`: where the two loss axes of a page of such runs begin and end."""
    seen, inline = {}, report_pictures.inline

    def watch(figure, name, *more):
        seen[name] = [axes.get_ylim() for axes in figure.axes]
        return inline(figure, name, *more)

    def drawn(*runs):
        folders = [made(f"r{place}", method) for place, method in enumerate(("frozen", "hosl")[: len(runs)])]
        for folder, (losses, dev) in zip(folders, runs, strict=True):
            _put_losses(folder, losses, dev)
        write_comparison(folders, tmp_path / "page.html")
        return seen["curves0"][:2]

    monkeypatch.setattr(report_pictures, "inline", watch)
    return drawn


def _put_losses(folder, losses, dev):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for_steps, for_dev = iter(losses), iter(dev)
    for line in lines:
        if line.get("split") != "test":
            line["loss_nats"] = next(for_dev if "split" in line else for_steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_dev_curve_above_the_first_training_loss_is_shown(limits):
    training, dev = limits(([0.05, 0.06, 0.04, 0.05, 0.03, 0.05], [0.4, 0.38]))
    assert training[0] < 0.03
    assert dev[0] < 0.38
    assert 0.4 < dev[1] <= 1.5 * 0.4


def test_a_run_that_diverges_leaves_the_others_readable(limits):
    training, dev = limits(([0.7] + 5 * [50.0], [60.0, 70.0]), ([0.7] + 5 * [0.5], [0.6, 0.5]))
    assert training == (0, pytest.approx(1.05))
    assert dev == (0, pytest.approx(1.05))


def test_where_all_diverge_what_they_do_is_shown(limits):
    training, dev = limits(([0.7] + 5 * [50.0], [60.0, 70.0]))
    assert training[0] < training[1]
    assert dev[0] < 60
    assert dev[1] > 70


def test_a_first_loss_of_zero_is_no_limit(limits):
    training, dev = limits((6 * [0.0], [0.4, 0.4]))  # equal limits would be a warning, and so an error
    assert training[0] == 0 < training[1]
    assert dev[0] < 0.4 < dev[1]


def test_ways_of_a_method_look_different():
    found = looks({f"way {place}": "hosl" for place in range(25)})
    assert len({(look.dashes, look.marker) for look in found.values()}) == 25
    assert {look.name for look in found.values()} == {"hosl"}
    strange = looks({"a": "new", "b": "newer"})  # methods without a colour share one
    assert strange["a"] != strange["b"]


def test_a_run_whose_costs_were_not_measured_is_shown_without_them(made, tmp_path):
    folders = [made("a"), made("b", "frozen")]
    (folders[0] / "timings.jsonl").write_text("")
    text = write_comparison(folders, tmp_path / "page.html").read_text()
    assert "highest mean test accuracy: hosl" in text
    assert "least client memory: frozen" in text
    assert "Accuracy against client memory" not in text  # one point is no picture
    assert "No step was timed" in write_report(folders[0]).read_text()


def test_labels_do_not_lie_on_each_other():
    labels = [Label(10.0, y, "frozen, cut 3", "ink") for y in (5.0, 5.1, 5.2)] + [
        Label(200.0, 5.0, "far", "ink")
    ]
    lifts = {(label.x, label.y): lift for label, lift in spread_apart(labels, lambda x, y: (x, 10 * y))}
    heights = sorted(10 * y + lift for (x, y), lift in lifts.items() if x == 10.0)
    assert all(high - low >= 11 for low, high in itertools.pairwise(heights))
    assert lifts[200.0, 5.0] == 0


def test_a_label_is_moved_off_the_point_of_another_too():
    """As long as it would be written over it: a point behind its end, or far above, leaves it where it is."""
    labels = [
        Label(10.0, 5.0, "frozen", "ink"),
        Label(30.0, 5.3, "hosl", "ink"),
        Label(200.0, 5.0, "far", "ink"),
    ]
    lifts = {label.text: lift for label, lift in spread_apart(labels, lambda x, y: (x, 10 * y))}
    assert 50 + lifts["frozen"] - 53 >= 11  # its letters end beyond the point of hosl
    assert lifts["far"] == 0
    assert lifts["hosl"] == 0 or abs(53 + lifts["hosl"] - (50 + lifts["frozen"])) >= 11


@pytest.mark.parametrize(
    ("size", "said"),
    [(4, "4 B"), (1023, "1023 B"), (2048, "2 KiB"), (1.5 * 2**20, "1.5 MiB"), (1000 * 2**20, "1000 MiB")],
)
def test_amounts_are_short(size, said):
    assert readable_bytes(size) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0004, "0.4 ms"), (0.0351, "35 ms"), (1.0, "1.00 s"), (62.5, "62.50 s")]
)
def test_durations_are_short(seconds, said):
    assert readable_seconds(seconds) == said


def test_counts_have_their_noun_in_the_right_number():
    assert [readable_count(count, "step") for count in (0, 1, 12345)] == ["0 steps", "1 step", "12,345 steps"]
    assert readable_count(12345) == "12,345"
