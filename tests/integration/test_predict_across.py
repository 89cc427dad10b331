"""`hosl predict` across the split, over loopback TLS: the bits of one process; the server is told no label."""

import json

import pytest

from hosl.cli import main
from hosl.wire import hosl_pb2 as pb
from tests.conftest import build
from tests.integration.languages import language_model, tuning
from tests.integration.network import Server, finished, join, split
from tests.integration.test_generate_across import merge_three_pieces

OPTIONS = {"fine": " great", "finer": " great was", "bad": " terrible"}


def rows_of_prompts(folder):
    file = folder / "rows.jsonl"
    rows = [{"text": f"w{i} w{i + 40}", "label": [*OPTIONS][i % 3]} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def setting(kind, labels, tmp_path, tiny_run):
    """The config of a run, its rows and the folder of its halves."""
    if kind == "files":
        config = tiny_run(max_steps=4)
        build("llama").save_pretrained(
            tmp_path / "model-in"
        )  # a decoder, which reads the class off the last token
        return config, tmp_path / "data.csv", split(tmp_path / "model-in", tmp_path / "halves")
    rows = rows_of_prompts(tmp_path)
    task = {"kind": "prompts", "template": "{text}\nIt was", "options": OPTIONS, "train": str(rows)}
    model = language_model(tmp_path / "model", "llama")
    config = tuning(tmp_path, model, task=task, wire={"labels": labels})
    words = ["split", str(model), str(tmp_path / "halves"), "--cut", "1", "--labels-at", labels]
    assert main(words) == 0
    return config, rows, tmp_path / "halves"


def predict(*words, status=0):
    assert main(["predict", *map(str, words)]) == status


def asked_of_a_server(monkeypatch):
    """The Scores and States that this process sends from now on."""
    from hosl.transport import channel

    sent, uploads, talks = [], channel.Channel.upload, channel.Channel.converse

    def recorded(call):
        def send(self, name, frames, reply_type):
            frames = list(frames)
            sent.extend(
                frame
                for frame in frames
                if isinstance(frame, pb.Upload) and frame.WhichOneof("part") != "chunk"
            )
            return call(self, name, frames, reply_type)

        return send

    monkeypatch.setattr(channel.Channel, "upload", recorded(uploads))
    monkeypatch.setattr(channel.Channel, "converse", recorded(talks))
    return sent


@pytest.mark.parametrize(
    ("kind", "labels"), [("files", "server"), ("prompts", "server"), ("prompts", "client")]
)
def test_across_the_split_it_is_what_one_process_says(tmp_path, tiny_run, capsys, monkeypatch, kind, labels):
    config, rows, halves = setting(kind, labels, tmp_path, tiny_run)
    assert main(["train", str(config)]) == 0
    predict(tmp_path / "run", rows, "-o", tmp_path / "here.jsonl")
    with Server(halves / "server", tmp_path / "service") as server:
        to = ("--to", server.line)
        predict(halves / "client", rows, "--config", config, *to, "-o", tmp_path / "before.jsonl")
        assert "as it was split, since" in capsys.readouterr().err
        joined = finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))
        checkpoints = sorted((tmp_path / "service").rglob("trained.safetensors"))
        sent = asked_of_a_server(monkeypatch)
        predict(tmp_path / "joined", rows, *to, "-o", tmp_path / "run.jsonl")
        said = capsys.readouterr().err
        assert f"after step {joined['steps']}; the server's half: run joined-" in said
        ours = tmp_path / "joined.yaml"  # the half with the config of its run: the same model
        ours.write_text(config.read_text().replace(str(tmp_path / "run"), str(tmp_path / "joined")))
        predict(halves / "client", rows, "--config", ours, *to, "-o", tmp_path / "half.jsonl")
        assert sorted((tmp_path / "service").rglob("trained.safetensors")) == checkpoints
        assert finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))[
            "finished"
        ]
    across = (tmp_path / "run.jsonl").read_bytes()
    assert (tmp_path / "half.jsonl").read_bytes() == across
    assert (tmp_path / "before.jsonl").read_bytes() != across
    if (
        labels == "client"
    ):  # its training is that of one process to rounding only, so the oracle is its own halves
        merge_three_pieces(
            tmp_path / "model", halves, tmp_path / "joined", tmp_path / "service", tmp_path / "merged"
        )
        predict(tmp_path / "merged", rows, "--config", ours, "-o", tmp_path / "merged.jsonl")
        found, due = (
            [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in ("run", "merged")
        )
        for one, other in zip(found, due, strict=True):
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    else:
        assert (tmp_path / "here.jsonl").read_bytes() == across
    assert sent
    for upload in sent:
        if labels == "client":
            assert upload.WhichOneof("part") == "states"
        elif kind == "files":
            assert not any(upload.scores.targets.classes.labels)  # the rows have labels, which stay here
