"""A low-precision base under float32 adapters, against the same half with its weights written out."""

from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hosl.core.directions import direction, direction_seed
from hosl.core.journal import Journal
from hosl.core.rounds import hosl_round
from hosl.errors import ConfigError, ModelError
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.memory import TorchMemory, resident_bytes
from hosl.parties.engine.perturbation import trained_parameters
from hosl.parties.servers.basic import FirstOrderServer
from hosl.split import (
    ClientHalf,
    LoraSpec,
    add_lora,
    export_checkpoint,
    load_half,
    quantise_,
    split_folder,
    split_model,
)  # fmt: skip
from hosl.split.quantised import Int8Linear, quantise_rows

DTYPES = ["bfloat16", "int8"]
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft's, of GPT-2's transposed layers


def _int8_layers(half):
    return {name: m for name, m in half.model.named_modules() if isinstance(m, Int8Linear)}


def _linear_layers(half):
    return {
        name: m
        for name, m in half.model.named_modules()
        if name.startswith(f"{half.blocks_name}.") and isinstance(m, torch.nn.Linear | Conv1D)
    }


def _rows(linear):
    """The weights [out, in]; GPT-2's own layer has them transposed."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _written_out(half, quantised):
    """`half` with the weights s q of `quantised` in its ordinary layers."""
    linear = _linear_layers(half)
    with torch.no_grad():
        for name, layer in _int8_layers(quantised).items():
            _rows(linear[name]).copy_(layer.weight * layer.scale[:, None].double())
    return half


def _half(tiny, name, base=None, dtype=torch.float32, cut=2):
    half, server_half = split_model(tiny(name, dtype), cut)
    if base:
        quantise_(half, base)
    return half, server_half


def _adapted(half, dtype=torch.float32, seed=2):
    """With adapters on every linear layer, both matrices drawn; B = 0 would hide the half of what they do."""
    targets = {name.rpartition(".")[2] for name in _linear_layers(half)}
    add_lora(half, LoraSpec(r=3, alpha=6, target_modules=tuple(sorted(targets))), seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained_parameters(half.model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return half


def _bits(half):
    return {name: tensor.detach().clone() for name, tensor in half.state_dict().items()}


def _rms(tensor):
    return float(tensor.double().pow(2).mean().sqrt())


def test_every_weight_of_the_blocks_is_within_half_a_scale_and_the_rest_keeps_its_bits(model_name, tiny):
    half, _ = _half(tiny, model_name, "int8")
    plain, _ = _half(tiny, model_name)
    layers, linear = _int8_layers(half), _linear_layers(plain)
    assert layers.keys() == linear.keys()
    for name, layer in layers.items():
        scale = layer.scale[:, None].double()
        error = (_rows(linear[name]).double() - scale * layer.weight).abs()
        # s and W / s are each rounded once: 127 units of at most 2^-24 relative, beside the half
        assert (error <= scale * (0.5 + 127 * 2**-23)).all()
        assert (layer.weight.abs().amax(1) == 127).all()
    kept = {f"{name}.weight" for name in layers}
    before, after = plain.state_dict(), half.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in kept)


def test_rows_of_zeros_stay_zero_and_no_row_is_infinite():
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [3e38, -1e38]])
    q, scale = quantise_rows(weight, "w")
    assert (weight - q * scale[:, None]).abs().le(scale[:, None] * 0.500001).all()
    assert q[0].tolist() == [0, 0]
    with pytest.raises(ModelError, match=r"fc1\.weight holds NaN or infinite"):
        quantise_rows(torch.tensor([[1.0, float("nan")]]), "fc1")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(700, 1000), (64, 5000), (5000, 64)])
def test_a_layer_of_many_tiles_errs_by_at_most_half_a_scale_per_input(shape, bias):
    """|y - y8| <= sum_i |x_i| s / 2 for each output; float64, so that nothing else is rounded."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(*reversed(shape), bias=bias, dtype=torch.float64)
    x = torch.randn(3, 4, shape[1], generator=generator, dtype=torch.float64)
    layer = Int8Linear(linear.weight, linear.bias, "w")
    with torch.no_grad():
        error = (linear(x) - layer(x)).abs()
        written = torch.nn.functional.linear(x, layer.weight * layer.scale[:, None].double(), linear.bias)
        torch.testing.assert_close(layer(x), written, rtol=1e-12, atol=1e-12)
    bound = x.abs().sum(-1, keepdim=True) * layer.scale * 0.50001
    assert (error <= bound).all()
    assert error.max() > 0


def test_an_int8_half_is_its_written_out_self_and_close_to_the_original(model_name, tiny, padded):
    """A row of 32 draws of deviation sigma has s of about 2.2 sigma / 127, and an error of s / sqrt(12) = 0.5 % sigma.

    At most 14 layers stand in a row, gates multiply two: 0.5 % sqrt(14) = 1.9 %, and 1.8 % is the worst measured.
    """
    ids, mask = padded("right")
    half, _ = _half(tiny, model_name, "int8")
    with torch.no_grad():
        h = half(ids, mask)
        original = _half(tiny, model_name)[0](ids, mask)
        written = _written_out(_half(tiny, model_name)[0], half)(ids, mask)
    assert h.dtype == torch.float32
    assert _rms(h - written) < 1e-5 * _rms(written)
    assert 1e-3 * _rms(original) < _rms(h - original) < 0.03 * _rms(original)


def test_a_bfloat16_half_computes_in_bfloat16_and_answers_in_the_models_dtype(model_name, tiny, padded):
    """8 bits of significand: 0.2 % per rounding; 1.2 % is the worst measured over the families."""
    ids, mask = padded("right")
    half, _ = _half(tiny, model_name, "bfloat16")
    bfloat16, _ = _half(tiny, model_name)
    bfloat16.convert(torch.bfloat16)
    with torch.no_grad():
        h, original = half(ids, mask), _half(tiny, model_name)[0](ids, mask)
        assert h.dtype == torch.float32
        assert torch.equal(h, bfloat16(ids, mask).float())
    assert 1e-3 * _rms(original) < _rms(h - original) < 0.03 * _rms(original)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_probes_over_an_int8_base_equal_two_forwards_with_the_adapters_written(
    model_name, tiny, class_batch, distribution
):
    """float64 computes and adapts, so only the order of sums may differ."""
    epsilon = 1e-2
    half = _adapted(_half(tiny, model_name, "int8", torch.float64)[0], torch.float64)
    client = ZerothOrderClient(half, distribution=distribution)
    assert client.trained
    assert all(".lora_" in name for name in client.trained)
    pair = client.probe(class_batch, 7, epsilon)
    assert _rms(pair[0] - pair[1]) > 1e-3
    for h, scale in zip(pair, (epsilon, -epsilon), strict=True):
        other = _adapted(_half(tiny, model_name, "int8", torch.float64)[0], torch.float64)
        with torch.no_grad():
            for name, p in trained_parameters(other.model).items():
                p.add_(torch.from_numpy(direction(7, name, tuple(p.shape), distribution)), alpha=scale)
            torch.testing.assert_close(h, other(*client._inputs(class_batch)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("name", ["opt", "llama", "bert", "gpt2"])
def test_a_probes_difference_is_that_of_the_written_out_float32_half(tiny, class_batch, name, base):
    """At epsilon 0.1, where bfloat16's rounding of h (0.4 %) does not drown it; at 1e-3 it does (ADR 6)."""
    differences = []
    for kind in (base, None):
        half, _ = _half(tiny, name, kind)
        if kind is None and base == "int8":
            _written_out(half, _half(tiny, name, "int8")[0])
        h_plus, h_minus = ZerothOrderClient(_adapted(half)).probe(class_batch, 7, 0.1)
        differences.append(h_plus - h_minus)
    tolerance = {"int8": 1e-4, "bfloat16": 0.2}[base]
    assert _rms(differences[0] - differences[1]) < tolerance * _rms(differences[1])


@pytest.mark.parametrize("base", DTYPES)
def test_probes_keep_every_bit_and_a_step_changes_the_adapters_alone(model_name, tiny, class_batch, base):
    half = _adapted(_half(tiny, model_name, base)[0])
    client = ZerothOrderClient(half)
    before = _bits(half)
    client.probe(class_batch, seed=3, epsilon=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in half.state_dict().items())
    client.descend(1, [3, 4], [0.5, -0.5], 1e-3)
    for name, tensor in half.state_dict().items():
        assert torch.equal(before[name], tensor) == (".lora_" not in name), name
        assert ".lora_" not in name or tensor.dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("base", DTYPES)
def test_the_journal_rebuilds_the_adapters_bit_for_bit(tiny, class_batch, base):
    client_half, server_half = _half(tiny, "bert", base)
    client = ZerothOrderClient(_adapted(client_half), distribution="rademacher")
    server = FirstOrderServer(server_half, learning_rate=lambda step: 1e-3)
    for step in range(1, 31):
        seeds = [direction_seed(9, step, q) for q in range(2)]
        hosl_round(client, server, class_batch, step=step, seeds=seeds, epsilon=1e-2, learning_rate=1e-3)
    late = ZerothOrderClient(_adapted(_half(tiny, "bert", base)[0]), distribution="rademacher")
    start = _bits(late.half)
    late.replay(Journal.from_bytes(client.journal.to_bytes()))
    rebuilt = late.half.state_dict()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in client_half.state_dict().items())
    assert any(not torch.equal(start[name], tensor) for name, tensor in rebuilt.items())


def test_backprop_through_an_int8_base_is_that_of_its_written_out_weights(model_name, tiny, class_batch):
    """float64: the adapters' gradients, autograd's own on the dequantised half as the oracle."""
    gradients = []
    for base in ("int8", None):
        half, _ = _half(tiny, model_name, base, torch.float64)
        if base is None:
            _written_out(half, _half(tiny, model_name, "int8", torch.float64)[0])
        client = FirstOrderClient(_adapted(half, torch.float64))
        h = half(*client._inputs(class_batch))
        loss = (h * torch.sin(torch.arange(h.numel(), dtype=h.dtype)).view(h.shape)).sum()
        gradients.append(
            dict(zip(client.trained, torch.autograd.grad(loss, client.trained.values()), strict=True))
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(700, 1000), (1000, 700)])
def test_the_backward_of_many_tiles_is_autograds(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(*reversed(shape), dtype=dtype)
    layer = Int8Linear(linear.weight, linear.bias, "w")
    x = torch.randn(2, 3, shape[1], generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(2, 3, shape[0], generator=generator).to(dtype)
    layer(x).backward(gradient)
    exact = gradient.double() @ (layer.weight * layer.scale[:, None].double())
    # the gradient times the scale is rounded once, the product once; float32 sums of 1000 a little more
    assert _rms(x.grad - exact) < 4 * torch.finfo(dtype).eps * _rms(exact)
    torch.testing.assert_close(layer.bias.grad, gradient.sum((0, 1)))


class _Wide:
    """A half in which weights outweigh activations: 2 blocks of width 512, 3 rows of 11 tokens."""

    def __init__(self, base):
        import transformers as hf

        config = hf.OPTConfig(
            vocab_size=97, hidden_size=512, ffn_dim=2048, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=512,
        )  # fmt: skip
        self.half, _ = split_model(hf.OPTForCausalLM(config), 2)
        if base:
            quantise_(self.half, base)

    @property
    def linear_bytes(self):
        layers = _linear_layers(self.half).values()
        return resident_bytes([t for m in layers for t in (m.weight, *m.buffers())])

    def peak_bytes(self, kind, call, *args):
        client = kind(_adapted(self.half))
        memory = TorchMemory(resident_bytes([*self.half.model.parameters(), *self.half.model.buffers()]))
        memory.watch(getattr(client, call), *args)
        return memory.peak_bytes


def test_an_int8_base_is_a_quarter_of_float32_and_its_probe_peaks_lower(option_batch):
    float32, bfloat16, int8 = _Wide(None), _Wide("bfloat16"), _Wide("int8")
    assert bfloat16.linear_bytes == float32.linear_bytes / 2
    assert (
        0.25 < int8.linear_bytes / float32.linear_bytes < 0.26
    )  # a scale of 4 bytes per row of 512 and 2048
    saved = float32.linear_bytes - int8.linear_bytes
    peaks = {
        wide: wide.peak_bytes(ZerothOrderClient, "probe", option_batch, 3, 1e-3)
        for wide in (float32, bfloat16, int8)
    }
    tile_bytes = 1 << 20
    assert peaks[int8] < peaks[float32] - saved + 2 * tile_bytes
    assert peaks[int8] < peaks[bfloat16] < peaks[float32]


def test_backprop_through_int8_keeps_no_dequantised_weights(option_batch):
    """Autograd of x (s q)^T would keep every layer's s q in float32: more than the float32 half itself."""
    float32, int8 = _Wide(None), _Wide("int8")
    saved = float32.linear_bytes - int8.linear_bytes
    peaks = [
        wide.peak_bytes(FirstOrderClient, "forward_for_backward", option_batch) for wide in (float32, int8)
    ]
    assert peaks[1] < peaks[0] - saved + 2 * (1 << 20)


@pytest.mark.parametrize("base", DTYPES)
def test_the_file_of_the_original_weights_is_let_go(tiny, tmp_path, base):
    """One embedding that still points into the mapped file would keep all of its float32 weights resident."""
    tiny("opt").save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 2, tmp_path / "halves")
    half = load_half(tmp_path / "halves" / "client")
    file, maps = str(tmp_path / "halves/client/model.safetensors"), Path("/proc/self/maps")
    assert file in maps.read_text()
    quantise_(half, base)
    assert file not in maps.read_text()


def test_a_half_with_adapters_is_not_quantised_and_a_quantised_one_is_not_exported(tiny, tmp_path):
    half, server_half = _half(tiny, "opt")
    _adapted(half)
    with pytest.raises(ConfigError, match="quantise it before add_lora"):
        quantise_(half, "int8")
    half, server_half = _half(tiny, "opt", "bfloat16")
    assert isinstance(half, ClientHalf)
    with pytest.raises(ConfigError, match="no longer has the weights of the model"):
        export_checkpoint(half, server_half, tmp_path / "out")
    assert not (tmp_path / "out").exists()
