import json
import subprocess
import sys

import pytest
import torch
import transformers as hf

from hosl.errors import FailureError, FolderError, ModelError, SplitError
from hosl.split import export_checkpoint, load_half, load_model, split_folder, split_model

CUTS = [0, 1, 2, 3]
SIDES = ["none", "left", "right"]


def _whole(model, ids, mask):
    options = {"use_cache": False} if hasattr(model, "lm_head") else {}
    if model.config.model_type == "gpt2":  # it would count the padding at the left
        leading = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        options["position_ids"] = (torch.arange(mask.shape[1]) - leading).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, **options).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cut", CUTS)
def test_two_halves_equal_the_whole_bit_for_bit(model_name, tiny, padded, cut, side, dtype):
    """In bf16 too: the same kernels see the same numbers in the same order."""
    model = tiny(model_name, dtype)
    ids, mask = padded(side)
    client, server = split_model(model, cut)
    with torch.no_grad():
        assert torch.equal(server(client(ids, mask), mask), _whole(model, ids, mask))


@pytest.mark.parametrize("cut", CUTS)
def test_the_names_of_the_halves_partition_those_of_the_whole(model_name, tiny, cut):
    model = tiny(model_name)
    client, server = (set(half.state_dict()) for half in split_model(model, cut))
    assert client | server == set(model.state_dict())
    assert not client & server


def test_logits_at_chosen_positions_are_those_of_the_whole(model_name, tiny, padded):
    model = tiny(model_name)
    if not hasattr(model, "lm_head"):
        pytest.skip("a classification head has no positions")
    ids, mask = padded("left")
    client, server = split_model(model, 1)
    with torch.no_grad():
        chosen = server(client(ids, mask), mask, torch.tensor([4, 9]))
        torch.testing.assert_close(chosen, _whole(model, ids, mask)[:, [4, 9]])


def test_gradients_through_the_cut_equal_those_of_the_whole(model_name, tiny, padded):
    model = tiny(model_name)
    ids, mask = padded("right")
    _whole(model, ids, mask).float().square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    client, server = split_model(model, 2)
    h = client(ids, mask)
    received = h.detach().requires_grad_()
    server(received, mask).float().square().mean().backward()
    h.backward(received.grad)
    found = {name: p.grad for half in (client, server) for name, p in half.named_parameters()}
    tied = set(type(model)._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()
    for name, gradient in expected.items():
        if name in tied or name in (type(model)._tied_weights_keys or {}).values():
            continue  # one tensor in the whole, two in the halves
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_halves_share_the_models_tensors_except_a_tied_head(tiny):
    model = tiny("opt")
    client, server = split_model(model, 1)
    own = {name: p.data_ptr() for name, p in model.named_parameters()}
    for half in (client, server):
        for name, p in half.named_parameters():
            assert (p.data_ptr() == own.get(name)) == (name != "lm_head.weight")
    assert torch.equal(server.model.lm_head.weight, client.model.model.decoder.embed_tokens.weight)


@pytest.mark.parametrize("cut", [-1, 4])
def test_a_cut_outside_the_model_is_refused_with_its_limits(tiny, cut):
    with pytest.raises(SplitError, match=rf"cut={cut} is outside 0..3: OPTForCausalLM has 3 blocks"):
        split_model(tiny("opt"), cut)


@pytest.mark.parametrize("cut", [0, 2, 3])
def test_a_split_folder_gives_the_same_halves_bit_for_bit(model_name, tiny, padded, tmp_path, cut):
    model = tiny(model_name)
    model.save_pretrained(tmp_path / "whole")
    head = "causal" if hasattr(model, "lm_head") else "classification"
    info = split_folder(tmp_path / "whole", cut, tmp_path / "split", head=head, num_labels=5)
    client, server = (load_half(tmp_path / "split" / side) for side in ("client", "server"))
    ids, mask = padded("left")
    with torch.no_grad():
        assert torch.equal(server(client(ids, mask), mask), _whole(model, ids, mask))
    for half, loaded in zip(split_model(model, cut), (client, server), strict=True):
        assert half.state_dict().keys() == loaded.state_dict().keys()
    assert info.client_bytes == sum(t.nbytes for t in client.state_dict().values())


def test_a_half_with_one_changed_byte_is_refused(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "whole")
    split_folder(tmp_path / "whole", 1, tmp_path / "split")
    weights = tmp_path / "split" / "client" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="do not have the digest"):
        load_half(tmp_path / "split" / "client")


def test_an_occupied_folder_is_left_alone(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "whole")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "precious").write_text("keep me")
    with pytest.raises(FolderError, match="nothing is overwritten"):
        split_folder(tmp_path / "whole", 1, tmp_path / "split")
    assert [p.name for p in (tmp_path / "split").iterdir()] == ["precious"]


def test_a_full_disk_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    tiny("gpt2").save_pretrained(tmp_path / "whole")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hosl.split.artifact.write_tensors", full)
    with pytest.raises(FailureError, match="No space left on device; nothing was left behind"):
        split_folder(tmp_path / "whole", 1, tmp_path / "split")
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_splitting_needs_less_memory_than_the_larger_half(tmp_path):
    """Peak growth of a fresh process, against halves of about 60 MiB; tensors are read and written one by one."""
    config = hf.OPTConfig(vocab_size=4000, hidden_size=512, word_embed_proj_dim=512, ffn_dim=2048)
    config.num_hidden_layers, config.num_attention_heads = 8, 8
    hf.OPTForCausalLM(config).save_pretrained(tmp_path / "whole", max_shard_size="40MB")
    script = (
        "import sys; from pathlib import Path; import hosl.split.artifact as a, transformers.models.opt.modeling_opt\n"
        "peak = lambda: next(int(x.split()[1]) * 1024 for x in open('/proc/self/status') if x.startswith('VmHWM'))\n"
        "before = peak()\n"
        "info = a.split_folder(sys.argv[1] + '/whole', 4, Path(sys.argv[1] + '/split'))\n"
        "print(peak() - before, info.client_bytes, info.server_bytes)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    growth, client, server = map(int, ran.stdout.split())
    assert growth < max(client, server)
    for side, size_bytes in (("client", client), ("server", server)):
        half = load_half(tmp_path / "split" / side)
        assert sum(t.nbytes for t in half.state_dict().values()) == size_bytes


def test_weights_cut_short_by_a_download_are_named(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cut short or damaged.*interrupted download"):
        load_model(str(tmp_path), head="causal", num_labels=None, seed=0)


def test_pickled_weights_are_never_read(tmp_path, tiny):
    tiny("gpt2").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin, which is pickle and never read"):
        load_model(str(tmp_path), head="causal", num_labels=None, seed=0)


def test_a_new_head_comes_from_the_seed_and_leaves_the_global_random_state_alone(tiny, tmp_path):
    tiny("bert").bert.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    first, again, other = (
        load_model(str(tmp_path), head="classification", num_labels=7, seed=seed) for seed in (1, 1, 2)
    )
    assert "classifier.weight" in first.initialised
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_the_exported_checkpoint_loads_without_hosl_and_gives_the_same_logits(tiny, padded, tmp_path, name):
    client, server = split_model(tiny(name), 1)
    with torch.no_grad():  # train the two sides apart, so that a tie must be given up
        for half in (client, server):
            for p in half.parameters():
                p.add_(0.01 * torch.sign(p))
    server.model.get_submodule("lm_head" if name == "opt" else "classifier").weight.data.mul_(1.5)
    export_checkpoint(client, server, tmp_path / "out")
    ids, mask = padded("right")
    with torch.no_grad():
        expected = server(client(ids, mask), mask)
    script = (
        "import json, sys, torch, transformers\n"
        "ids, mask, path, auto = json.loads(sys.argv[1])\n"
        "model = getattr(transformers, auto).from_pretrained(path).eval()\n"
        "logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits\n"
        "assert 'hosl' not in sys.modules\n"
        "print(json.dumps(logits.tolist()))\n"
    )
    auto = "AutoModelForCausalLM" if name == "opt" else "AutoModelForSequenceClassification"
    asked = json.dumps([ids.tolist(), mask.tolist(), str(tmp_path / "out"), auto])
    ran = subprocess.run([sys.executable, "-c", script, asked], capture_output=True, text=True, check=True)
    assert torch.equal(torch.tensor(json.loads(ran.stdout)), expected)


def test_real_weights_split_bit_for_bit(hosl_data):
    loaded = load_model(str(hosl_data / "models/minilm-l6-as-opt"), head="causal", num_labels=None, seed=0)
    ids, mask = torch.arange(5, 25).view(2, 10), torch.ones(2, 10, dtype=torch.int64)
    with torch.no_grad():
        whole = _whole(loaded.model, ids, mask)
        for cut in range(8):
            client, server = split_model(loaded.model, cut)
            assert torch.equal(server(client(ids, mask), mask), whole)
