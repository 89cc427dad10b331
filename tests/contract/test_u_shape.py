"""The U-shaped split: three pieces equal the whole bit for bit, and no tensor is on two sides."""

import json
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

from hosl.cli import main
from hosl.errors import ModelError, SplitError
from hosl.split import (
    ClientHalf,
    HeadHalf,
    ServerHalf,
    TrunkHalf,
    load_half,
    load_head,
    load_model,
    set_trainable,
    split_folder,
    split_model,
    split_u_shape,
)
from tests.conftest import BLOCKS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CUTS = range(BLOCKS + 1)


def _kind(model):
    return "causal" if hasattr(model, "lm_head") else "classification"


def _positions(model):
    return torch.tensor([3, 7, 10] if _kind(model) == "causal" else [0])


def _whole(model, ids, mask, positions=None):
    """Hugging Face's own logits, asked for at these positions; None: all."""
    options = {"use_cache": False} if _kind(model) == "causal" else {}
    with _projecting_only(model, positions) as left:
        if left is not None and _kind(model) == "causal":
            options["logits_to_keep"] = left
        if model.config.model_type == "gpt2":  # it would count the padding at the left
            leading = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
            options["position_ids"] = (torch.arange(mask.shape[1]) - leading).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, **options).logits


@contextmanager
def _projecting_only(model, positions):
    """Hands OPT's project_out the asked positions alone, and says which are still to be chosen after it.

    A matrix product of 9 rows may round otherwise than one of 33. HF's lm_head is given the kept positions, its
    project_out all of them; a client has only the scored ones. With the same rows the bits are the same.
    """
    project_out = getattr(getattr(model.base_model, "decoder", None), "project_out", None)
    if project_out is None or positions is None:
        yield positions
        return
    hook = project_out.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, positions],))
    try:
        yield None
    finally:
        hook.remove()


@DTYPES
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cut", CUTS)
def test_three_pieces_equal_the_whole_bit_for_bit(tiny, model_name, padded, cut, side, dtype):
    model = tiny(model_name, dtype)
    ids, mask = padded(side)
    positions = _positions(model)
    client, trunk, head = split_u_shape(model, cut)
    with torch.no_grad():
        h = client(ids, mask)
        states = trunk(h, mask, positions)
        assert states.shape == (3, len(positions), model.config.hidden_size)
        assert states.dtype == dtype
        assert torch.equal(head(states), _whole(model, ids, mask, positions))
        if _kind(model) == "causal":
            everywhere = torch.arange(ids.shape[1])
            assert torch.equal(head(trunk(h, mask, everywhere)), _whole(model, ids, mask))


@DTYPES
def test_the_head_reads_no_mask(tiny, model_name, padded, dtype):
    model = tiny(model_name, dtype)
    ids, mask = padded("left")
    client, trunk, head = split_u_shape(model, 1)
    with torch.no_grad():
        states = trunk(client(ids, mask), mask, _positions(model))
        padding = torch.ones(states.shape[:2], dtype=torch.int64)
        padding[0, 1:] = 0
        assert torch.equal(head(states), head(states, padding))
        assert torch.equal(head(states), head.logits(states))


@pytest.mark.parametrize("cut", CUTS)
def test_names_of_the_pieces_partition_the_wholes(tiny, model_name, cut):
    """A tied lm_head.weight is named by the head, and is the client's embedding: one parameter, two names."""
    model = tiny(model_name)
    pieces = split_u_shape(model, cut)
    names = [name for piece in pieces for name in piece.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    client, trunk, head = pieces
    tied = type(model)._tied_weights_keys if model.config.tie_word_embeddings else {}
    embeddings = dict(client.named_parameters())
    for name, p in head.named_parameters():
        assert (p is embeddings.get((tied or {}).get(name))) == (name in (tied or {}))
    owned = {id(p) for half in (client, head) for p in half.parameters()}
    assert not owned & {id(p) for p in trunk.parameters()}


@pytest.mark.parametrize("cut", CUTS)
def test_the_trunk_holds_blocks_and_nothing_else(tiny, model_name, cut):
    """The point of the split: whoever has the trunk has nothing to read logits from states with."""
    _, trunk, head = split_u_shape(tiny(model_name), cut)
    assert {name.removeprefix(f"{trunk.blocks_name}.").split(".")[0] for name in trunk.state_dict()} == {
        str(block) for block in range(cut, BLOCKS)
    }
    assert not any(name.startswith(f"{head.blocks_name}.") for name in head.state_dict())


def test_pieces_share_the_models_tensors(tiny, model_name):
    model = tiny(model_name)
    own = {id(p) for p in model.parameters()}
    pieces = split_u_shape(model, 1)
    assert {id(p) for piece in pieces for p in piece.parameters()} == own
    assert not any(module.training for piece in pieces for module in piece.model.modules())


def test_gradients_through_three_pieces_equal_those_of_the_whole(tiny, model_name, padded):
    """A tied weight too: here one parameter has both of its gradients, as in the whole."""
    model = tiny(model_name)
    ids, mask = padded("right")
    positions = _positions(model)
    _whole(model, ids, mask, positions).square().mean().backward()
    expected = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    model.zero_grad()
    client, trunk, head = split_u_shape(model, 2)
    h = client(ids, mask)
    received = h.detach().requires_grad_()
    states = trunk(received, mask, positions)
    at = states.detach().requires_grad_()
    head(at).square().mean().backward()
    states.backward(at.grad)
    h.backward(received.grad)
    found = {id(p): p.grad for piece in (client, trunk, head) for p in piece.parameters()}
    assert expected
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cut", [-1, BLOCKS + 1])
def test_a_cut_outside_the_model_is_refused(tiny, cut):
    with pytest.raises(SplitError, match=rf"cut={cut} is outside 0..3"):
        split_u_shape(tiny("opt"), cut)


def test_the_trunk_gives_the_states_that_the_ordinary_server_half_norms(tiny, padded):
    model = tiny("llama")
    ids, mask = padded("left")
    client, server = split_model(model, 2)
    _, trunk, head = split_u_shape(model, 2)
    positions = torch.tensor([9, 10])
    with torch.no_grad():
        h = client(ids, mask)
        assert torch.equal(head(trunk(h, mask, positions)), server(h, mask, positions))


@DTYPES
@pytest.mark.parametrize("cut", [0, 2, BLOCKS])
def test_a_u_shaped_folder_gives_the_same_bits(tiny, model_name, padded, tmp_path, cut, dtype):
    saved, out = tiny(model_name, dtype), tmp_path / "out"
    saved.save_pretrained(tmp_path / "model")
    # as HF reads it: rotary frequencies stay float32 in a bf16 model, where .to(bf16) would round them
    model = type(saved).from_pretrained(tmp_path / "model", dtype=dtype).eval()
    info = split_folder(tmp_path / "model", cut, out, head=_kind(model), num_labels=5, labels="client")
    pieces = split_u_shape(model, cut)
    client, trunk = load_half(out / "client"), load_half(out / "server")
    head = load_head(out / "client", client)
    assert [type(piece) for piece in (client, trunk, head)] == [ClientHalf, TrunkHalf, HeadHalf]
    for piece, loaded in zip(pieces, (client, trunk, head), strict=True):
        expected, found = piece.state_dict(), loaded.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    ids, mask = padded("left")
    positions = _positions(model)
    with torch.no_grad():
        found = head(trunk(client(ids, mask), mask, positions))
        assert torch.equal(found, pieces[2](pieces[1](pieces[0](ids, mask), mask, positions)))
        assert torch.equal(found, _whole(model, ids, mask, positions))
    ours = {id(p): p.nbytes for half in (client, head) for p in half.parameters()}  # a tie once
    assert info.client_bytes == sum(ours.values())
    assert info.server_bytes == sum(p.nbytes for p in trunk.parameters())


def test_half_json_says_what_lies_where(tiny, model_name, tmp_path):
    model = tiny(model_name)
    model.save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "out", head=_kind(model), num_labels=5, labels="client")
    at_client, at_server = _facts(tmp_path / "out" / "client"), _facts(tmp_path / "out" / "server")
    assert at_client["digest"] == at_client["client_digest"] == at_server["client_digest"]
    assert at_server["digest"] == at_server["server_digest"] == at_client["server_digest"]
    tied = bool(model.config.tie_word_embeddings and _kind(model) == "causal")
    for facts in (at_client, at_server):
        assert (facts["format"], facts["labels"], facts["tied_head"]) == (1, "client", tied)
        assert facts["new_weights"] == []
    head = safetensors.torch.load_file(tmp_path / "out" / "client" / "head.safetensors")
    assert ("lm_head.weight" in head) == (_kind(model) == "causal" and not tied)
    assert sorted(path.name for path in (tmp_path / "out" / "server").iterdir()) == [
        "config.json", "half.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_tie_is_found_again_and_the_clients_choice_of_what_to_train_stays(tiny, tmp_path, name):
    client, head = _reloaded(tiny(name), tmp_path, before_head=lambda half: set_trainable(half, "none"))
    embedding = client.model.get_input_embeddings().weight
    assert (head.model.lm_head.weight is embedding) == (name == "opt")
    assert not any(p.requires_grad for p in client.parameters())
    assert all(p.requires_grad for p in head.parameters() if p is not embedding)


def test_a_head_read_after_the_client_half_was_converted_shares_the_converted_embedding(tiny, tmp_path):
    client, head = _reloaded(tiny("opt"), tmp_path, before_head=lambda half: half.to(torch.bfloat16))
    head.to(torch.bfloat16)
    assert head.model.lm_head.weight is client.model.get_input_embeddings().weight
    assert {p.dtype for half in (client, head) for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("file", ["client/model", "client/head", "server/model"])
@pytest.mark.parametrize("damage", ["changed", "cut short", "absent"])
def test_a_damaged_piece_is_refused(tiny, tmp_path, file, damage):
    tiny("gpt2").save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "out", labels="client")
    client = load_half(tmp_path / "out" / "client")
    weights = tmp_path / "out" / f"{file}.safetensors"
    data = weights.read_bytes()
    match damage:
        case "changed":
            weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "cut short":
            weights.write_bytes(data[:-100])
        case "absent":
            weights.unlink()
    read = (lambda folder: load_head(folder, client)) if file == "client/head" else load_half
    expected = "do not have the digest" if damage == "changed" else "cannot be read"
    with pytest.raises(ModelError, match=expected):
        read(weights.parent)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_folder_of_the_ordinary_split_has_no_head(tiny, tmp_path, side):
    tiny("opt").save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "out")
    client = load_half(tmp_path / "out" / "client")
    with pytest.raises(ModelError, match="--labels-at client"):
        load_head(tmp_path / "out" / side, client)


def test_a_half_json_without_labels_means_the_server(tiny, tmp_path):
    tiny("opt").save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "out")
    path = tmp_path / "out" / "server" / "half.json"
    facts = json.loads(path.read_text())
    assert (facts.pop("labels"), facts.pop("tied_head")) == ("server", False)
    path.write_text(json.dumps(facts))
    assert type(load_half(path.parent)) is ServerHalf


def test_a_new_head_of_the_command_line_comes_from_its_seed(tiny, tmp_path, capsys):
    """The same as a run's with that seed, though the client reads it from its own folder."""
    tiny("bert").bert.save_pretrained(tmp_path / "model")
    words = ["--cut", "1", "--head", "classification", "--num-labels", "7", "--labels-at", "client", "--json"]
    for option in ("--num-labels", "--labels"):  # the old name still serves
        words = [option if word in ("--num-labels", "--labels") else word for word in words]
        out = tmp_path / option.strip("-")
        assert main(["split", str(tmp_path / "model"), str(out), *words, "--seed", "4"]) == 0
        assert json.loads(capsys.readouterr().out)["cut"] == 1
        client = load_half(out / "client")
        head = load_head(out / "client", client)
        run = load_model(str(tmp_path / "model"), head="classification", num_labels=7, seed=4)
        assert sorted(run.initialised) == sorted(_facts(out / "server")["new_weights"])
        assert "classifier.weight" in run.initialised
        for name in run.initialised:
            assert torch.equal(head.state_dict()[name], run.model.state_dict()[name])


def _facts(folder):
    return json.loads((folder / "half.json").read_text())


def _reloaded(model, folder, before_head):
    model.save_pretrained(folder / "model")
    split_folder(folder / "model", 1, folder / "out", head=_kind(model), labels="client")
    client = load_half(folder / "out" / "client")
    before_head(client)
    return client, load_head(folder / "out" / "client", client)
