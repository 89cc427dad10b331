"""half.json as a crash or a hand may leave it: one line that names the file and the key."""

import json

import pytest

from hosl.cli import main
from hosl.errors import ModelError
from hosl.split import load_half, split_folder


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "format"),
        ([], "array"),
        (None, "null"),
        ({"side": 7}, "side"),
        ({"side": "middle"}, "side"),
        ({"cut": "2"}, "cut"),
        ({"cut": True}, "cut"),
        ({"head": None}, "head"),
        ({"family": ["bert"]}, "family"),
        ({"labels": "nowhere"}, "labels"),
        ({"classes": "5"}, "classes"),
        ({"client_digest": 5}, "client_digest"),
    ],
)
def test_a_half_json_that_says_nothing_or_nonsense_is_named_with_its_key(
    tiny, tmp_path, capsys, content, named
):
    tiny("bert").save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "halves", head="classification", num_labels=5)
    client = tmp_path / "halves" / "client"
    facts = json.loads((client / "half.json").read_text())
    (client / "half.json").write_text(json.dumps(facts | content if content else content))
    (tmp_path / "config.yaml").write_text("max_steps: 1\n")
    with pytest.raises(ModelError) as refused:
        load_half(client)
    assert main(["audit", str(client), "--config", str(tmp_path / "config.yaml")]) == 1
    said = capsys.readouterr().err
    for message in (str(refused.value), said):
        assert str(client / "half.json") in message
        assert named in message.replace(str(client), "")
    assert said.count("\n") == 1
