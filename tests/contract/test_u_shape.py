"""The U-shaped split: three pieces equal the whole bit for bit, and no tensor is on two sides."""

import json
from copy import deepcopy

import pytest
import torch
from tests.conftest import BLOCKS

from hosl.errors import ModelError
from hosl.split import load_half, load_head, split_folder, split_model, split_u_shape


def _positions(whole):
    return torch.tensor([0]) if "Sequence" in type(whole).__name__ else torch.tensor([3, 7, 10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_three_pieces_equal_the_whole(tiny, model_name, padded, cut, side, dtype):
    whole = tiny(model_name, dtype)
    ids, mask = padded(side)
    positions = _positions(whole)
    with torch.no_grad():
        kept = {} if len(positions) == 1 else {"logits_to_keep": positions}
        expected = whole(input_ids=ids, attention_mask=mask, **kept).logits
        client, trunk, head = split_u_shape(deepcopy(whole), cut)
        states = trunk(client(ids, mask), mask, positions)
        assert states.shape == (3, len(positions), whole.config.get_text_config().hidden_size)
        if model_name == "opt-projections":
            # its project_out is a matrix product over the scored positions here, over all of them in the whole: other
            # blocking, so the last bits may differ; row-wise norms do not care
            torch.testing.assert_close(head.logits(states), expected)
        else:
            assert torch.equal(head.logits(states), expected)


@pytest.mark.parametrize("cut", [0, 2])
def test_names_of_the_pieces_partition_the_wholes(tiny, model_name, cut):
    whole = tiny(model_name)
    pieces = split_u_shape(deepcopy(whole), cut)
    names = [name for piece in pieces for name, _ in piece.named_parameters()]
    ours = {name for name, _ in whole.named_parameters()}
    shared = set(names) - ours  # a tied head shows the client's embedding under the head's name
    client, _, head = pieces
    embeddings = {id(p) for p in client.parameters()}
    assert all(id(p) in embeddings for name, p in head.named_parameters() if name in shared)
    assert sorted(set(names) - shared) == sorted(ours)
    assert len(set(names)) == len(names)


def test_a_u_shaped_folder_gives_the_same_bits(tiny, model_name, padded, tmp_path):
    model = tiny(model_name)
    model.save_pretrained(tmp_path / "model")
    kind = "classification" if "Sequence" in type(model).__name__ else "causal"
    split_folder(tmp_path / "model", 1, tmp_path / "out", head=kind, labels="client")
    ids, mask = padded("right")
    positions = _positions(model)
    client, trunk, head = split_u_shape(deepcopy(model), 1)
    client_again, trunk_again = load_half(tmp_path / "out" / "client"), load_half(tmp_path / "out" / "server")
    head_again = load_head(tmp_path / "out" / "client", client_again)
    with torch.no_grad():
        expected = head.logits(trunk(client(ids, mask), mask, positions))
        assert torch.equal(head_again.logits(trunk_again(client_again(ids, mask), mask, positions)), expected)
    assert json.loads((tmp_path / "out" / "server" / "half.json").read_text())["labels"] == "client"


def test_a_folder_of_the_ordinary_split_has_no_head(tiny, tmp_path):
    tiny("opt").save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "out")
    client = load_half(tmp_path / "out" / "client")
    with pytest.raises(ModelError, match="--labels-at client"):
        load_head(tmp_path / "out" / "client", client)


def test_the_trunk_gives_the_states_that_the_ordinary_server_half_norms(tiny, padded):
    model = tiny("llama")
    ids, mask = padded("left")
    client, server = split_model(deepcopy(model), 2)
    _, trunk, head = split_u_shape(deepcopy(model), 2)
    positions = torch.tensor([9, 10])
    with torch.no_grad():
        h = client(ids, mask)
        assert torch.equal(head.logits(trunk(h, mask, positions)), server(h, mask, positions))
