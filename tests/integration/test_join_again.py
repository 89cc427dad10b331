"""`hosl join` repeated: the same run by its content, a finished one stays finished, and its folder says what it is."""

import json
import os

import pytest
import yaml

from hosl.cli import main
from hosl.config import parse_config
from hosl.errors import ConfigError
from hosl.network.join import _joined_run
from hosl.network.joined_session import JoinedSession
from tests.integration.network import Server, split


@pytest.fixture
def served(tiny_run, tmp_path, unchecked):
    config = tiny_run(
        max_steps=6, save_steps=2, eval_steps=3, output_dir=str(tmp_path / "runs [1]" / "my [2]")
    )
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        words = ["join", str(halves / "client"), "--to", server.line, "--config", str(config), "--json"]
        yield config, words, server


def test_a_joined_run_is_known_by_its_content_and_stays_finished(
    served, tmp_path, monkeypatch, power_failure, capsys
):
    config, words, server = served
    folder = tmp_path / "runs [1]" / "my [2]"
    folder.mkdir(parents=True)  # a command that was killed at once left it, empty
    with power_failure(JoinedSession, 5):
        assert main(words) == 1
    run_id = json.loads((folder / "record.json").read_text())["run_id"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    for file in (config, folder / "config.yaml"):
        os.utime(file, (1, 1))
    settings = yaml.safe_load(config.read_text())
    again = (
        {"wire": {"idle_s": 50.0}}
        | dict(reversed(settings.items()))
        | {"output_dir": "runs [1]/../runs [1]/my [2]"}
    )
    config.write_text("# the same, written in another way\n" + yaml.safe_dump(again, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert json.loads((folder / "record.json").read_text())["run_id"] == run_id
    timed = map(json.loads, (folder / "timings.jsonl").read_text().splitlines())
    steps = [line["step"] for line in timed if "split" not in line]
    assert steps == [1, 2, 3, 4, 5, 6]

    server.stop()  # a finished run needs none
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "is finished" in err
    assert json.loads(out) == first
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    whole = (folder / "metrics.jsonl").read_bytes()
    for lost in (b"", None):
        (folder / "metrics.jsonl").unlink() if lost is None else (folder / "metrics.jsonl").write_bytes(lost)
        assert main(words) == 0  # the steps by the checkpoint, the scores by evaluation.json
        out, err = capsys.readouterr()
        assert "metrics.jsonl has lost its lines" in err
        left, known = (
            json.loads(out),
            ("steps", "client_digest", "test_accuracy", "test_f1_macro", "test_loss_nats"),
        )
        assert {key: left[key] for key in known} == {key: first[key] for key in known}
        assert left["train_loss_nats"] is None
    (folder / "metrics.jsonl").write_bytes(whole)

    for command in (["eval", str(folder)], ["export", str(folder), str(tmp_path / "out")],
                    ["train", "--resume", str(folder)]):  # fmt: skip
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "was made by `hosl join`" in err
        assert "Traceback" not in err
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0  # as the message says


def test_a_damaged_record_of_a_joined_run_ends_with_one_line(served, tmp_path, capsys, monkeypatch):
    words = served[1]
    folder = tmp_path / "runs [1]" / "my [2]"
    monkeypatch.setattr(JoinedSession, "round", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(words)
    for content in (b"", b"\0" * 40, b"[]"):
        (folder / "record.json").write_bytes(content)
        assert main(words) == 2
        err = capsys.readouterr().err
        assert "record.json is damaged" in err
        assert "Traceback" not in err
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_client_of_shared_halves_that_starts_again_keeps_its_metrics(
    tiny_run, tmp_path, unchecked, power_failure
):
    config = tiny_run(max_steps=6, eval_steps=3, clients={"count": 2, "halves": "shared"})
    halves, run = split(tmp_path / "model-in", tmp_path / "halves"), tmp_path / "run"
    with Server(halves / "server", tmp_path / "service") as server:
        words = ["join", str(halves / "client"), "--to", server.line, "--config", str(config), "--json"]
        with power_failure(JoinedSession, 5):
            assert main(words) == 1
        before = (run / "metrics.jsonl").read_bytes()
        assert before.count(b'"loss_nats"') == 5  # four steps and one evaluation
        assert main(words) == 0
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    lines = [json.loads(line) for line in after.splitlines()]
    assert [line["step"] for line in lines if "split" not in line] == [1, 2, 3, 4, 5, 6]


def test_a_run_named_like_a_second_one_is_not_taken_for_it(tmp_path):
    def joined(name, **settings):
        content = {"output_dir": str(tmp_path / name), "method": "hosl"} | settings
        said = []
        return _joined_run(parse_config(content, where="test"), said.append), said

    (other, _), (mine, said) = joined("my-2"), joined("my")
    assert (mine.folder.name, mine.under_way, said) == ("my", False, [])
    assert mine.identity != other.identity
    (again, _), (third, said) = joined("my"), joined("my", seed=1)
    assert again == mine._replace(under_way=True)
    assert third.folder.name == "my-3"
    assert said == [f"output_dir {tmp_path / 'my'} is taken; this run is {tmp_path / 'my-3'}"]


@pytest.mark.parametrize("at", ["client:\n  trainable: blocks\n", "max_steps: 6\n", ""])
def test_a_joined_run_whose_config_was_cut_is_named_and_no_second_run_begins(tmp_path, at):
    def joined(**settings):
        config = parse_config({"output_dir": str(tmp_path / "my"), "max_steps": 6} | settings, where="test")
        return _joined_run(config, print)

    settings = {"client": {"learning_rate": 0.5}, "eval_steps": 2}
    run = joined(**settings)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text[: text.index(at) + len(at)])
    with pytest.raises(ConfigError, match=r"config .*my/config\.yaml (lacks .*: it was cut|is empty)"):
        joined(**settings)
    assert [p.name for p in tmp_path.iterdir()] == ["my"]
    assert not joined(**settings, seed=1).under_way  # another run, as before
    (run.folder / "config.yaml").write_text(text)
    assert joined(**settings) == run._replace(under_way=True)
