"""A row's scores are its own: those of the row alone in plain transformers, whatever stands beside it in the batch."""

import numpy as np
import pytest
import torch

from hosl.config import Config
from hosl.config.sections import ModelConfig
from hosl.errors import SplitError
from hosl.planner.budget import check_before_run
from hosl.split import split_model
from hosl.tasks import Example
from hosl.tasks.collate import class_batch, option_batch
from hosl.tasks.prompts import PromptTask

LENGTHS = (13, 4, 9, 2, 13)


def _rows(seed=0):
    generator = np.random.default_rng(seed)
    return [tuple(int(i) for i in generator.integers(3, 97, length)) for length in LENGTHS]


def _logits(model, batch, cut=1):
    """The logits of both halves together, at every position."""
    client, server = split_model(model, cut)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).to(torch.int64)
    with torch.no_grad():
        return server(client(ids, mask), mask)


def _alone(model, row):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("cut", [0, 2])
def test_a_rows_scores_do_not_depend_on_the_rows_beside_it(model_name, tiny, cut):
    model, rows = tiny(model_name), _rows()
    if hasattr(model, "lm_head"):
        found = _logits(model, option_batch(rows, [1] * len(rows), pad_id=1), cut)
        found = [logits[-len(row) :] for logits, row in zip(found, rows, strict=True)]
    else:
        found = _logits(model, class_batch([Example((row,), 0) for row in rows], pad_id=1), cut)
    for logits, row in zip(found, rows, strict=True):
        torch.testing.assert_close(logits, _alone(model, row), rtol=1e-4, atol=1e-4)


def _scaled(model, kind, limit):
    """The model with rotary frequencies that change beyond `limit` tokens; every other weight is the same."""
    rope = {"rope_theta": 1e4, "rope_type": kind, "factor": 4.0}
    settings = {"max_position_embeddings": limit}
    if kind == "longrope":
        settings = {"max_position_embeddings": 4 * limit}
        rope |= {
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": limit,
        }
    config = type(model.config).from_dict(model.config.to_diff_dict() | settings | {"rope_parameters": rope})
    scaled = type(model)(config).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_beyond_a_rotary_scaling_are_refused_and_shorter_ones_are_right(tiny, name, kind):
    rows = _rows()
    batch = option_batch(rows, [1] * len(rows), pad_id=1)
    within = _scaled(tiny(name), kind, limit=13)
    for logits, row in zip(_logits(within, batch), rows, strict=True):
        torch.testing.assert_close(logits[-len(row) :], _alone(within, row), rtol=1e-4, atol=1e-4)
    beyond = _scaled(tiny(name), kind, limit=8)
    with pytest.raises(
        SplitError, match=r"a row of 13 tokens: .* beyond 8, .*set task.max_tokens: 8 or less"
    ):
        _logits(beyond, batch)


def test_transformers_scores_a_row_by_its_neighbours_beyond_the_scaling(tiny):
    """The reason for the refusal: where this no longer holds, hosl need not refuse."""
    row, model = _rows()[1], _scaled(tiny("llama"), "longrope", limit=8)
    batch = option_batch(_rows()[:2], [1, 1], pad_id=1)
    with torch.no_grad():
        beside = model(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.targets.mask).long(),
        ).logits[1, -len(row) :]
    assert (beside - _alone(model, row)).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["train", "dev", "test"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_run_with_rows_beyond_the_scaling_does_not_start(tiny, tmp_path, kind, part):
    _scaled(tiny("llama"), kind, limit=8).save_pretrained(tmp_path)
    examples = [Example((row, row), 0, (1, 1)) for row in _rows()]
    parts = dict.fromkeys(("train", "dev", "test"), examples[1:2])
    config = Config(model=ModelConfig(name=str(tmp_path)))
    check_before_run(config, str(tmp_path), PromptTask("SST-2", ("a", "b"), **parts, pad_id=1), alone=False)
    task = PromptTask("SST-2", ("a", "b"), **parts | {part: examples}, pad_id=1)
    with pytest.raises(SplitError, match="a row of 13 tokens"):
        check_before_run(config, str(tmp_path), task, alone=False)
