"""Model folders that people have changed by hand, read by whole commands."""

import json
from hashlib import sha256

import pytest

from hosl.cli import main
from tests.integration.network import split


def _change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("method", ["hosl-residual", "hosl-node", "fo-recompute"])
def test_a_model_that_asks_for_a_cache_trains_by_methods_that_go_over_its_blocks_again(
    tiny_run, tmp_path, capsys, method
):
    metrics = {}
    for cached in (True, False):
        config = tiny_run(method=method, max_steps=2, output_dir=str(tmp_path / f"{method}-{cached}"))
        _change(tmp_path / "model-in", is_decoder=True, use_cache=cached)
        assert main(["train", str(config)]) == 0, capsys.readouterr().err
        metrics[cached] = (tmp_path / f"{method}-{cached}" / "metrics.jsonl").read_bytes()
    assert metrics[True] == metrics[False]


@pytest.mark.parametrize("verb", ["train", "split", "plan"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"), ("layer_norm_eps", "small"), ("id2label", 5), ("num_labels", "2"), ("dtype", "float99"),
        ("rope_scaling", "none"), ("text_config", {"hidden_size": "32"}), ("num_hidden_layers", "3"),
    ],
)  # fmt: skip
def test_a_value_of_config_json_that_is_of_another_kind_is_named_and_not_the_tokenizer(
    tiny_run, tmp_path, capsys, verb, key, value
):
    config = tiny_run()
    _change(tmp_path / "model-in", **{key: value})
    asked = (
        [str(config)]
        if verb != "split"
        else [str(tmp_path / "model-in"), str(tmp_path / "out"), "--cut", "1"]
    )
    assert main([verb, *asked]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "model-in" / "config.json") in said
    assert key in said
    assert "tokenizer" not in said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["cut", "name", "classes"])
def test_a_device_is_told_that_its_config_is_of_another_model_cut_or_class_count_than_its_half(
    tiny_run, tiny, tmp_path, capsys, what
):
    config = tiny_run()
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    words = ["--to", f"hosl://127.0.0.1:9#{'a' * 43}", "--plaintext", "--config", str(config)]
    if what == "cut":
        words += ["--model.cut", "1"]
        expected = ("model.cut is 1", "was cut at 2")
    elif what == "name":
        tiny("bert", seed=1).save_pretrained(tmp_path / "another")
        words += ["--model.name", str(tmp_path / "another")]
        digests = [
            sha256((tmp_path / m / "model.safetensors").read_bytes()).hexdigest()[:12]
            for m in ("another", "model-in")
        ]
        expected = (f"model.name is {tmp_path / 'another'}", *digests)
    else:
        with (tmp_path / "data.csv").open("a") as file:
            file.writelines(f"{word},third\n" for word in ("red", "one", "two", "green", "blue"))
        expected = ("has 3 classes", "was split for 2", "--labels 3")
    assert main(["join", str(halves / "client"), *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(part in said for part in expected), said
    assert not (tmp_path / "run").exists()
