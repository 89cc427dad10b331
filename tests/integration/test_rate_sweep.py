"""`client.learning_rate: auto`: what it chooses, what it says, and that the run itself does not notice."""

import errno
import json
import os
import tempfile
from functools import partial

import pytest
import yaml
from msgspec.structs import replace

from hosl.cli import main
from hosl.config import Config, load_config
from hosl.training import learning_rate_sweep
from hosl.training.learning_rate_sweep import (
    HELD_OUT_BATCHES,
    Tried,
    _batches,
    _chosen,
    _tried,
    sweep,
    with_rate,
)
from hosl.training.local_session import LocalSession, new_session
from tests.conftest import build


@pytest.mark.usefixtures("unchecked")
def test_the_run_after_a_sweep_is_the_run_with_that_number(tiny_run, tmp_path, capsys):
    config = tiny_run(method="hosl-gradient", client={"learning_rate": "auto"})
    assert main(["train", str(config), "--json", "--output-dir", str(tmp_path / "auto")]) == 0
    said = capsys.readouterr().err
    rates = load_config(config).learning_rates.to_try_for("blocks")
    kept = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["client"]["learning_rate"]
    assert kept in rates
    assert f"client.learning_rate: {kept:g}: " in said
    assert "s left" in said
    record = json.loads((tmp_path / "auto" / "record.json").read_text())["sweep"]
    assert record["client_learning_rate"] == kept
    assert [tried["rate"] for tried in record["tried"]] == list(rates)
    by_hand = tiny_run(method="hosl-gradient", client={"learning_rate": kept})
    assert main(["train", str(by_hand), "--json", "--output-dir", str(tmp_path / "number")]) == 0
    assert (tmp_path / "auto" / "metrics.jsonl").read_bytes() == (
        tmp_path / "number" / "metrics.jsonl"
    ).read_bytes()


def test_a_sweep_repeats_itself_and_reads_rows_that_no_step_saw(tiny_run):
    config = load_config(
        tiny_run(method="hosl-node", client={"learning_rate": "auto", "trainable": "blocks"})
    )
    rates, said = config.learning_rates.to_try_for("blocks"), []
    first = sweep(config, said.append, steps=2)
    first.file.unlink()
    assert sweep(config, said.append, steps=2) == first
    assert [tried.rate for tried in first.tried] == list(rates)
    assert len(said) == 2 * (len(rates) + 2)
    assert not any("kept from before" in line for line in said)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("step", "where"), [(3, "beside the run"), (1, "in its empty folder")])
def test_a_killed_sweep_goes_on_with_its_tries_to_the_same_bits(
    tiny_run, tmp_path, monkeypatch, capsys, step, where
):
    """Killed in step 3 of the fourth try, or just before its first."""
    config = tiny_run(method="hosl-gradient", client={"learning_rate": "auto"})
    monkeypatch.setattr(learning_rate_sweep, "sweep", partial(sweep, steps=4))
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    if where == "in its empty folder":
        killed.mkdir(parents=True)
    asked = ["train", str(config), "--json", "--output-dir"]
    assert main([*asked, str(whole)]) == 0
    begun, rounds = _tries_begun(monkeypatch), LocalSession.round

    def power_fails(session, batch, at):
        if len(begun) == 4 and at >= step:
            raise OSError("the power fails here")
        return rounds(session, batch, at)

    with monkeypatch.context() as patched:
        patched.setattr(LocalSession, "round", power_fails)
        assert main([*asked, str(killed)]) == 1
    (kept,) = (tmp_path / "killed").rglob("*.json")
    known = json.loads(kept.read_text())
    assert list(map(float, known)) == begun[:3]
    begun.clear()
    capsys.readouterr()
    assert main([*asked, str(killed)]) == 0
    assert not set(begun) & set(map(float, known))
    said = capsys.readouterr().err
    assert said.count("kept from before") == 3
    for name in ("metrics.jsonl", "config.yaml"):
        theirs, ours = ((run / name).read_text() for run in (whole, killed))
        assert ours.replace(str(killed), str(whole)) == theirs
    records = [json.loads((run / "record.json").read_text())["sweep"] for run in (whole, killed)]
    assert records[0] == records[1]
    assert not kept.exists()
    assert not list((tmp_path / "whole").glob(".sweep*"))


def _tries_begun(monkeypatch):
    """The rates whose tries have begun from now on, in order."""
    begun, held_out = [], learning_rate_sweep._held_out_losses

    def noted(config, rate, steps):
        begun.append(rate)
        return held_out(config, rate, steps)

    monkeypatch.setattr(learning_rate_sweep, "_held_out_losses", noted)
    return begun


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change", ["a row", "the model", "the seed", "nothing", "a torn file"])
def test_tries_of_other_data_or_settings_are_not_taken(tiny_run, tmp_path, monkeypatch, change):
    path = tiny_run(method="hosl-gradient", client={"learning_rate": "auto"})
    config = load_config(path)
    first, begun = sweep(config, print, steps=1), _tries_begun(monkeypatch)
    if change == "a row":
        with (tmp_path / "data.csv").open("a") as file:
            file.write("red new red,other\n")
    elif change == "the model":
        build("bert", seed=1).save_pretrained(tmp_path / "model-in")
    elif change == "the seed":
        config = replace(config, seed=1)
    elif change == "a torn file":
        first.file.write_bytes(first.file.read_bytes()[:30])
    again = sweep(config, print, steps=1)
    assert len(begun) == (0 if change == "nothing" else len(first.tried) + 1)
    assert (again == first) == (change in ("nothing", "a torn file"))


@pytest.mark.parametrize("rate", ["auto", 1e-3])
@pytest.mark.parametrize("place", ["file/run", "file/deep/run", "full/run"])
def test_an_output_dir_that_cannot_be_made_is_refused_before_the_model_is_read(
    tiny_run, tmp_path, monkeypatch, capsys, rate, place
):
    config = tiny_run(client={"learning_rate": rate})
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    opened = tempfile.TemporaryFile

    def written(**at):
        if at["dir"] == tmp_path / "full":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(**at)

    monkeypatch.setattr(tempfile, "TemporaryFile", written)
    assert main(["train", str(config), "--output-dir", str(tmp_path / place)]) == 2
    (said,) = capsys.readouterr().err.splitlines()  # nothing of the model or of a try
    assert f"output_dir {tmp_path / place} cannot be made" in said
    assert not list((tmp_path / "full").iterdir())


def test_a_refused_config_leaves_no_folder_and_no_try(tiny_run, tmp_path, capsys):
    config = tiny_run(client={"learning_rate": "auto"}, model={"name": str(tmp_path / "model-in"), "cut": 99})
    assert main(["train", str(config), "--output-dir", str(tmp_path / "a" / "run")]) == 2
    assert "99" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_try_that_cannot_be_written_keeps_those_before(tiny_run, tmp_path, monkeypatch, capsys):
    config = tiny_run(method="hosl-gradient", client={"learning_rate": "auto"})
    begun, whole_file = _tries_begun(monkeypatch), learning_rate_sweep.whole_file

    def full(path, content):
        if len(begun) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole_file(path, content)

    monkeypatch.setattr(learning_rate_sweep, "whole_file", full)
    assert main(["train", str(config)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "could not be written: No space left on device; the tries before are kept" in last
    (kept,) = tmp_path.glob(".sweep*")
    assert list(map(float, json.loads(kept.read_text()))) == begun[:1]


def _of(rate, gain, error: float | None = 0.01):
    return Tried(rate, None if gain is None else 1.0 - gain, gain, None if gain is None else error)


@pytest.mark.parametrize(
    ("tried", "rate", "why"),
    [
        (
            [_of(1e-3, 0.1), _of(1e-2, 0.3), _of(1e-1, None)],
            1e-2,
            "the largest gain that is no noise, after 20 steps 0.3000 ± 0.0100",
        ),
        # the largest gain is noise, a smaller one is none
        ([_of(1e-3, 0.1), _of(1e-2, 0.3, 0.2), _of(1e-1, -0.05, 0.1)], 1e-3, "0.1000 ± 0.0100"),
        # one held-out batch has no error: nothing is called a gain
        ([_of(1e-3, 0.1, None), _of(1e-2, 0.3, None)], 1e-2, "no rate can be told to beat"),
        # the noisiest rate is not harmless for its noise
        ([_of(1e-2, 0.3, 0.2), _of(1e-1, -0.05, 0.1)], 1e-2, "the largest that did no harm"),
        ([_of(1e-3, 0.0), _of(1e-2, 0.015), _of(1e-1, -0.2)], 1e-2, "the largest that did no harm"),
        ([_of(1e-3, -0.1), _of(1e-2, None)], 1e-3, "all tried raised the held-out loss"),
        ([_of(1e-3, None), _of(1e-2, None)], 1e-3, "all tried raised the held-out loss"),
    ],
)
def test_only_what_beats_a_client_that_stays_is_called_a_gain(tried, rate, why):
    found, reason = _chosen(tried, 20)
    assert found == rate
    assert why in reason


def test_one_held_out_batch_shows_no_gain():
    assert _tried(1e-3, [0.9], [1.0]).gain_nats == pytest.approx(0.1)
    assert not _tried(1e-3, [0.9], [1.0]).gained
    assert _tried(1e-3, [0.9, 0.8], [1.0, 0.9]).gained


def test_few_rows_are_held_out_in_batches_small_enough_for_an_error(tiny_run):
    """A fifth of them fits into one batch of the run's own size."""
    config = load_config(tiny_run(client={"learning_rate": "auto"}, per_device_train_batch_size=64))
    session = new_session(replace(config.with_client_rate(0.0), max_steps=2))
    seen, held_out = _batches(session, 2)
    rows = len(session.task.train) // 5
    assert rows < 64
    sizes = [len(batch.input_ids) for batch in held_out]
    assert (len(sizes), sum(sizes)) == (min(HELD_OUT_BATCHES, rows), rows)
    assert max(sizes) - min(sizes) <= 1
    assert [len(batch.input_ids) for batch in seen] == [64, 64]


@pytest.mark.parametrize(
    ("method", "client", "rate"),
    [
        ("hosl-node", {}, 1e-2),
        ("hosl", {}, 1e-5),
        ("zo-zo", {}, 1e-3),
        ("fo-recompute", {"trainable": "last-block"}, 1e-2),
        ("hosl", {"trainable": "lora"}, 1e-3),
        ("fo-fo", {}, 3e-3),
        ("fo-fo", {"optimiser": {"name": "adamw"}}, 3e-5),
    ],
)
def test_a_rate_that_is_left_out_is_the_methods_usual_one(tiny_run, method, client, rate):
    config = load_config(tiny_run(method=method, client=client))
    assert (Config().method, Config().client.trainable) == ("hosl-node", "blocks")
    assert config.client.learning_rate is None
    assert config.client_rate == rate
    numbered, swept = with_rate(config, print)
    assert (numbered.client.learning_rate, swept) == (rate, None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"method": "frozen", "client": {"learning_rate": "auto"}},
            "auto has nothing to try for method frozen",
        ),
        ({"client": {"learning_rate": "automatic"}}, "automatic"),
        ({"client": {"learning_rate": "1e-3"}}, "write 1.0e-3"),
        ({"client": {"learning_rate": -1.0}}, "must be >= 0, auto or null, got -1.0"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(tiny_run, capsys, settings, said):
    assert main(["train", str(tiny_run(**settings))]) == 2
    assert said in capsys.readouterr().err


def test_a_device_alone_cannot_sweep(tiny_run, tmp_path, capsys):
    config = tiny_run(client={"learning_rate": "auto"})
    line = "hosl://127.0.0.1:1#" + "A" * 43 + "." + "B" * 43
    assert main(["join", str(tmp_path), "--to", line, "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "which only `hosl train` has" in said
