"""Model folders that people have changed by hand, read by whole commands."""

import json

import pytest

from hosl.cli import main


def _change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("method", ["hosl-guided", "hosl-node", "fo-recompute"])
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
