"""Every family beyond those that all tests run: halves, pieces, folders, exports and adapters equal the whole.

One tiny model per family for the whole module; cases differ by the cut and the attention, paddings are looped over.
"""

from contextlib import contextmanager

import peft
import pytest
import safetensors
import torch

from hosl.planner.model_shape import model_shape
from hosl.split import (
    LoraSpec,
    add_lora,
    export_adapter,
    export_checkpoint,
    load_half,
    load_head,
    load_model,
    set_trainable,
    split_folder,
    split_model,
    split_u_shape,
)
from hosl.split.families import row_of
from hosl.split.structure import _by_structure
from tests.conftest import build
from tests.families import BLOCKS, MORE_MODELS

CUTS = range(BLOCKS + 1)
SIDES = ("none", "left", "right")
SDPA = [name for name, (model_class, *_) in MORE_MODELS.items() if model_class._supports_sdpa]


@pytest.fixture(scope="module", params=MORE_MODELS)
def family(request):
    """A tiny model, built once; tests leave it as it was."""
    return build(request.param)


@pytest.fixture(scope="module", params=SDPA)
def eager(request):
    """The same with the other attention, for the families that have both."""
    return build(request.param, attention="eager")


def _row(model):
    return row_of(model.config, type(model).__name__)


def _head(model):
    return _row(model).head


def _options(model, mask):
    options = {"use_cache": False} if _row(model).is_decoder else {}
    if _row(model).positions_from_mask:  # it would count the padding at the left
        options["position_ids"] = (torch.arange(mask.shape[1]) - mask.argmax(-1, keepdim=True)).clamp(min=0)
    return options


def _whole(model, ids, mask, **options):
    return model(input_ids=ids, attention_mask=mask, **_options(model, mask), **options).logits


def _equal_at_every_padding(model, cut, padded):
    client, server = split_model(model, cut)
    with torch.no_grad():
        for side in SIDES:
            ids, mask = padded(side)
            whole = _whole(model, ids, mask)
            assert whole.isfinite().all()
            assert torch.equal(server(client(ids, mask), mask), whole), side


@pytest.mark.parametrize("cut", CUTS)
def test_two_halves_equal_the_whole_bit_for_bit(family, padded, cut):
    assert family.config._attn_implementation == ("sdpa" if type(family)._supports_sdpa else "eager")
    _equal_at_every_padding(family, cut, padded)


@pytest.mark.parametrize("cut", CUTS)
def test_with_eager_attention_too(eager, padded, cut):
    assert eager.config._attn_implementation == "eager"
    _equal_at_every_padding(eager, cut, padded)


def test_in_bfloat16_too(family, padded):
    _equal_at_every_padding(build(_name(family), torch.bfloat16), 1, padded)


def _name(model):
    return next(
        name for name, row in MORE_MODELS.items() if isinstance(model, row[0]) and _settings(model, row[2])
    )


def _settings(model, settings):
    return all(getattr(model.config, key) == value for key, value in settings.items())


@pytest.mark.parametrize("cut", CUTS)
def test_names_of_the_halves_partition_the_wholes_but_for_what_both_read(family, cut):
    client, server = (set(half.state_dict()) for half in split_model(family, cut))
    shared = tuple(f"{name}." for name in _row(family).shared)
    both = {name for name in family.state_dict() if shared and name.startswith(shared)}
    assert client | server == set(family.state_dict())
    assert client & server == both


@contextmanager
def _scoring_only_the_last_token(model, mask):
    """A decoder's score multiplies every token; a client's has the last one, and fewer rows may round differently."""
    if not _row(model).pools_last_token:
        yield
        return
    last = (torch.arange(mask.shape[1]) * mask).argmax(-1)
    row = torch.arange(len(mask))

    def score(layer, inputs):
        return (inputs[0][row, last][:, None],)

    def spread(layer, inputs, output):
        return output.expand(-1, mask.shape[1], -1)

    hooks = [model.score.register_forward_pre_hook(score), model.score.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("cut", CUTS)
def test_three_pieces_equal_the_whole_bit_for_bit(family, padded, cut):
    positions = torch.tensor([3, 7, 10] if _head(family) == "causal" else [0])
    kept = {"logits_to_keep": positions} if _head(family) == "causal" else {}
    client, trunk, head = split_u_shape(family, cut)
    blocks = {f"{trunk.blocks_name}.{block}." for block in range(cut, BLOCKS)}
    owned = tuple(blocks | {f"{name}." for name in trunk.shared})
    assert all(name.startswith(owned) for name in trunk.state_dict())
    with torch.no_grad():
        for side in SIDES:
            ids, mask = padded(side)
            states = trunk(client(ids, mask), mask, positions)
            assert states.shape == (3, len(positions), family.config.hidden_size)
            with _scoring_only_the_last_token(family, mask):
                assert torch.equal(head(states), _whole(family, ids, mask, **kept)), side


def test_gradients_through_the_cut_equal_those_of_the_whole(family, padded):
    model = build(_name(family))
    ids, mask = padded("right")
    _whole(model, ids, mask).square().mean().backward()
    tied = (model.config.tie_word_embeddings and type(model)._tied_weights_keys) or {}
    passed = {*tied, *tied.values()}  # one tensor in the whole, two in the halves
    expected = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and n not in passed
    }
    model.zero_grad()
    client, server = split_model(model, 2)
    h = client(ids, mask)
    received = h.detach().requires_grad_()
    server(received, mask).square().mean().backward()
    h.backward(received.grad)
    found = {
        name: p.grad for half in (client, server) for name, p in half.named_parameters() if p.requires_grad
    }
    shared = tuple(f"{name}." for name in client.shared)
    assert len(expected) > 10 * BLOCKS / 3
    for name, gradient in expected.items():
        if shared and name.startswith(shared):
            assert name not in found
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def _in_own_memory_(model):
    """Each weight at its own address: a product of one row rounds by where in a file's memory its weight lies."""
    for p in model.parameters():
        p.data = p.data.clone()
    return model


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    family.save_pretrained(folder)
    return folder


def test_it_is_read_as_transformers_reads_it(family, saved):
    expected = type(family).from_pretrained(saved).state_dict()
    loaded = load_model(str(saved), head=_head(family), num_labels=5, seed=0)
    assert loaded.initialised == ()
    assert expected.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    buffers = dict(family.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in loaded.model.named_buffers())


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_split_folder_gives_the_same_halves_bit_for_bit(family, saved, padded, tmp_path, labels):
    split_folder(saved, 2, tmp_path / "out", head=_head(family), num_labels=5, labels=labels)
    client, server = (load_half(tmp_path / "out" / side) for side in ("client", "server"))
    pieces = (
        (client, server, load_head(tmp_path / "out" / "client", client))
        if labels == "client"
        else (client, server)
    )
    own = split_u_shape(family, 2) if labels == "client" else split_model(family, 2)
    for loaded, piece in zip(pieces, own, strict=True):
        expected = piece.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        _in_own_memory_(loaded.model)
    if labels == "server":
        ids, mask = padded("left")
        with torch.no_grad():
            assert torch.equal(server(client(ids, mask), mask), _whole(family, ids, mask))


def test_an_export_is_named_as_transformers_saves_it_and_gives_the_same_logits(
    family, saved, padded, tmp_path
):
    client, server = split_model(family, 1)
    export_checkpoint(client, server, tmp_path / "out")
    names = []
    for folder in (saved, tmp_path / "out"):
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    ids, mask = padded("right")
    with torch.no_grad():
        exported = _in_own_memory_(type(family).from_pretrained(tmp_path / "out").eval())
        assert torch.equal(_whole(exported, ids, mask), _whole(family, ids, mask))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_two_halves_with_default_adapters_equal_peft_on_the_whole(family, padded, tmp_path):
    model = build(_name(family))
    ids, mask = padded("right")
    halves = client, server = split_model(build(_name(family)), 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        before = _whole(model, ids, mask)
        for half in halves:
            add_lora(half, LoraSpec(r=3, alpha=6), seed=1)
        assert torch.equal(server(client(ids, mask), mask), before)
        for half in halves:
            trained = [p for p in half.parameters() if p.requires_grad]
            assert trained
            for p in trained:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        found = server(client(ids, mask), mask)
        export_adapter(client, server, tmp_path / "adapter")
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
        expected = adapted(input_ids=ids, attention_mask=mask, **_options(model, mask)).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_both_halves_read_is_never_trained(family):
    for half in split_model(build(_name(family)), 1):
        for which in ("all", "blocks", "none"):
            set_trainable(half, which)
            frozen = tuple(f"{name}." for name in half.shared)
            wanted = f"{half.blocks_name}." if which == "blocks" else ""
            trained = {name for name, p in half.named_parameters() if p.requires_grad}
            assert trained == {
                name
                for name, _ in half.named_parameters()
                if which != "none" and name.startswith(wanted) and not (frozen and name.startswith(frozen))
            }


def test_a_plan_knows_its_shape(family, saved):
    shape = model_shape(str(saved), head=_head(family), num_labels=5)
    assert (shape.blocks, shape.width) == (BLOCKS, 32)
    fewer = shape.of_blocks(2)
    for of, blocks in ((shape, BLOCKS), (fewer, 2)):
        client, server = of.halves(1)
        count = sum(p.numel() for half in (client, server) for p in half.parameters())
        assert count > 0
        assert len(server.model.get_submodule(server.blocks_name)) == blocks


def test_what_its_structure_shows_is_its_row(family):
    """The rows and the look at a forward pass are two ways to the same names; each checks the other."""
    found, reason = _by_structure(type(family), family.config.to_json_string(use_diff=False))
    row = _row(family)
    if row.shared:
        assert found is None
        assert "is read by no call" in reason
        return
    assert found is not None, reason
    assert (found.blocks, found.head, found.pools_last_token) == (row.blocks, row.head, row.pools_last_token)
    assert found.blocks_return_tuples == row.blocks_return_tuples
    for seen, listed in ((found.client_only, row.client_only), (found.server_only, row.server_only)):
        of_row = {name for name in family.state_dict() if name.startswith(tuple(f"{m}." for m in listed))}
        of_seen = {name for name in family.state_dict() if name.startswith(tuple(f"{m}." for m in seen))}
        assert of_seen == of_row
