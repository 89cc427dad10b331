"""`client.learning_rate: auto`: what it chooses, what it says, and that the run itself does not notice."""

import json

import pytest
import yaml
from msgspec.structs import replace

from hosl.cli import main
from hosl.config import Config, load_config
from hosl.training.learning_rate_sweep import (
    HELD_OUT_BATCHES,
    Tried,
    _batches,
    _chosen,
    _tried,
    sweep,
    with_rate,
)
from hosl.training.local_session import new_session


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
    first, second = (sweep(config, said.append, steps=2) for _ in range(2))
    assert first == second
    assert [tried.rate for tried in first.tried] == list(rates)
    assert len(said) == 2 * (len(rates) + 1)


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
    found = _chosen(tried, 20)
    assert found.rate == rate
    assert why in found.why


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
