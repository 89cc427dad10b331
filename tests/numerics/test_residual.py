"""Residual feedback: the oracle is autograd on a model in which no gradient enters an output projection's input.

There dL/dh goes down the residual stream alone, through its norms and multipliers, which is what the method assumes.
"""

from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import peft
import pytest
import torch
from torch import nn

from hosl.config import parse_config
from hosl.core.rounds import StepInputs, hosl_residual_round, hosl_residual_slopes_round
from hosl.core.targets import Batch, ClassTargets
from hosl.errors import ConfigError, NonFiniteError, SplitError
from hosl.methods.torch_parties import make_client
from hosl.parties.clients.guided import GuidedClient
from hosl.parties.clients.residual import ResidualClient
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import LoraSpec, add_lora, load_model, split_model
from hosl.training.alignment import alignment
from tests.conftest import BLOCKS, MODELS, build
from tests.families import MORE_MODELS
from tests.numerics.test_guided import _batch, _gradient, _Linear, _weights

ROWS, ETA = 5, 0.3
EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss")
FAMILIES = (*MODELS, *MORE_MODELS)
KEPT = ("stream", "blocks", "inputs")


def _client(model, cut=BLOCKS, **options):
    half, _ = split_model(deepcopy(model), cut)
    options = {"blocks": 2, **options}
    return ResidualClient(half, **options)


@contextmanager
def _stream_alone(half):
    """Gradients reach the layers below through the stream only: what an output projection reads is a constant."""

    def constant(module, args):
        return (args[0].detach(), *args[1:])

    blocks = half.model.get_submodule(half.blocks_name)
    layers = [block.get_submodule(name) for block in blocks for name in half.output_projections]
    layers += [block.mlp for block in blocks if half.family in EXPERTS]
    hooks = [layer.register_forward_pre_hook(constant) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def _by_stream(client, batch, g):
    """The gradients of the client's trained weights by the stream alone, from autograd."""
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
    with _stream_alone(client.half):
        (client.half(ids, mask) * g).sum().backward()
    return _taken(client)


def _taken(client):
    """The gradients of the client's weights, which are then without any."""
    found = {}
    for name, p in client.trained.items():
        assert p.grad is not None
        found[name], p.grad = p.grad, None
    return found


def _step(client, batch, g, eta=ETA):
    return hosl_residual_round(client, _Linear(g), batch, StepInputs(1, learning_rate=eta))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_is_the_gradient_that_comes_down_the_residual_stream(family, padded):
    dtype = (
        torch.float32 if family.removesuffix(" (class)") in EXPERTS else torch.float64
    )  # experts know no float64
    _check_update(_client(build(family, dtype)), _batch(padded), 1e-6 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("family", ["bloom", "falcon", "falcon-multi-query", "falcon-alibi"])
@pytest.mark.parametrize("at_once", [2, ROWS])
def test_so_it_is_where_the_stream_is_taken_behind_a_norm(family, at_once, padded):
    """In BLOOM it then goes through both norms of a block; transformers' Falcon has the setting and never reads it."""
    model = build(family, torch.float64, apply_residual_connection_post_layernorm=True)
    client = _client(model, blocks=3, micro_batch_size=at_once)
    assert bool(client.half.norms_on_stream) == (family == "bloom")
    _check_update(client, _batch(padded), 1e-6)


def _check_update(client, batch, rounding):
    """A step moves what is trained by -eta times its gradient by the stream alone, up to `rounding` of the largest."""
    g = _gradient(client, batch)
    expected, before = _by_stream(client, batch, g), _weights(client)
    assert torch.equal(client.forward_keeping_inputs(batch), client.forward(batch))
    _step(client, batch, g)
    moved = {name: p.detach() - before[name] for name, p in client.half.named_parameters()}
    assert {name for name, by in moved.items() if by.any()} == set(client.trained) == set(expected)
    for name, gradient in expected.items():
        # some norms round to float32
        atol = rounding * ETA * float(gradient.abs().max())
        torch.testing.assert_close(moved[name], -ETA * gradient, rtol=0, atol=atol)


def test_the_update_is_g_times_x_to_float64(tiny, padded):
    """The formula itself, written out for one pre-LN family."""
    client, batch, read = _client(tiny("llama", torch.float64)), _batch(padded), {}
    layers = dict(client._projections)
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, n=name: read.__setitem__(n, args[0]))
        for name, layer in layers.items()
    ]
    g = _gradient(client, batch)  # its forward pass is the one that is read
    for hook in hooks:
        hook.remove()
    before = _weights(client)
    _step(client, batch, g)
    for name in layers:
        u = sum(torch.outer(g[r, t], read[name][r, t]) for r in range(ROWS) for t in range(g.shape[1]))
        moved = client.trained[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(moved, -ETA * u, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("at_once", [2, ROWS])
def test_what_is_kept_changes_not_a_bit(tiny, model_name, padded, kept, at_once):
    model, batch = tiny(model_name), _batch(padded)
    if kept == "stream" and split_model(deepcopy(model), 1)[0].norms_on_stream:
        with pytest.raises(AssertionError, match="norms on the stream"):
            _client(model, kept=kept)
        return
    found = []
    for choice in ("blocks", kept):
        client = _client(model, kept=choice, micro_batch_size=at_once)
        _step(client, batch, _gradient(client, batch))
        found.append(_weights(client))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("family", "above"), [("llama", "stream"), ("opt-post-ln", "blocks")])
@pytest.mark.parametrize("at_once", [2, None])
def test_auto_keeps_the_inputs_of_blocks_where_they_take_little_beside_the_half(tiny, family, above, at_once):
    """Up to 8 % of the half's bytes, by the whole batch; through norms on the stream, always."""
    client = _client(tiny(family), micro_batch_size=at_once)
    held = sum(t.nbytes for t in (*client.half.model.parameters(), *client.half.model.buffers()))
    a_token = 2 * client.half.config.hidden_size * 4  # in each of two trained blocks, float32
    most = int(0.08 * held / a_token)
    for tokens, kept in ((most, "blocks"), (most + 1, above)):
        ids = np.full((tokens, 1), 3)
        targets = ClassTargets(np.ones(ids.shape, np.int8), np.zeros(tokens, np.int64))
        client.forward_keeping_inputs(Batch(ids, targets))
        assert all(part.stream_alone == (kept == "stream") for part in client._parts)
        inputs = [call.args[0] is not None for part in client._parts for call in part.calls]
        assert inputs == ([True, True] if kept == "blocks" else [True, False]) * len(client._parts)


@pytest.mark.parametrize(("kept", "evaluated"), [("stream", 1), ("blocks", 0), ("inputs", 0)])
def test_a_block_is_evaluated_no_further_than_it_is_read(tiny, padded, kept, evaluated):
    """The last layer of a block is computed again only where the next block's input is made of it."""
    client, batch, calls = _client(tiny("opt"), blocks=3, kept=kept), _batch(padded), []
    g = _gradient(client, batch)
    client.forward_keeping_inputs(batch)
    for name, layer in client._projections.items():
        layer.register_forward_hook(lambda m, args, output, n=name: calls.append(n))
    client.descend_by_feedback(g, ETA)
    lower = [name for name in calls if name.endswith("fc2")]
    assert len(lower) == 2 * evaluated
    assert len(calls) - len(lower) == (0 if kept == "inputs" else 3)


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_change_rounding_alone(tiny, model_name, padded, rows):
    model, batch = tiny(model_name, torch.float64), _batch(padded)
    found = []
    for at_once in (rows, ROWS):
        client = _client(model, micro_batch_size=at_once)
        _step(client, batch, _gradient(client, batch))
        found.append(_weights(client))
    for name in found[0]:
        rounding = (
            (1e-4, 1e-6) if model_name in ("gemma2", "gemma3") else (1e-9, 1e-12)
        )  # their norms are float32
        torch.testing.assert_close(found[0][name], found[1][name], rtol=rounding[0], atol=rounding[1])


@pytest.mark.parametrize(
    "spec",
    [OptimiserSpec(momentum=0.9), OptimiserSpec(name="adamw", weight_decay=0.1)],
    ids=["momentum", "adamw"],
)
def test_three_steps_of_an_optimiser_are_torchs_on_these_gradients(tiny, padded, spec):
    client, reference = (_client(tiny("opt", torch.float64), optimiser=spec) for _ in range(2))
    batch, parameters = _batch(padded), list(reference.trained.values())
    theirs = (
        torch.optim.AdamW(parameters, lr=ETA, weight_decay=0.1)
        if spec.name == "adamw"
        else torch.optim.SGD(parameters, lr=ETA, momentum=0.9)
    )
    for seed in range(3):
        g = _gradient(client, batch, seed)
        _step(client, batch, g)
        for p, gradient in zip(parameters, _by_stream(reference, batch, g).values(), strict=True):
            p.grad = gradient
        theirs.step()
        theirs.zero_grad()
    for name, p in client.trained.items():
        torch.testing.assert_close(p, reference.trained[name], rtol=1e-9, atol=1e-11)


def test_a_deeper_block_takes_a_decayed_step(tiny, padded):
    batch, moved = _batch(padded), {}
    for decay in (1.0, 0.5):
        client = _client(tiny("llama", torch.float64), blocks=3, decay=decay)
        before = _weights(client)
        _step(client, batch, _gradient(client, batch))
        moved[decay] = {name: p.detach() - before[name] for name, p in client.trained.items()}
    for name in moved[1.0]:
        depth = BLOCKS - 1 - int(name.split(".layers.")[1].split(".")[0])
        torch.testing.assert_close(moved[0.5][name], 0.5**depth * moved[1.0][name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("family", "alone"),
    [
        ("llama", None),
        ("gpt2", None),
        ("opt", None),
        ("gemma2", None),
        ("distilbert", "lin2"),
        ("gemma2", "o_proj"),
    ],
)
def test_adapters_on_output_projections_get_pefts_gradients(tiny, padded, family, alone):
    half, _ = split_model(tiny(family, torch.float64), BLOCKS)
    leaves = (alone,) if alone else tuple({name.rpartition(".")[2] for name in half.output_projections})
    add_lora(half, LoraSpec(r=3, alpha=6, target_modules=leaves), seed=1)
    with torch.no_grad():
        for name, p in half.named_parameters():
            if "lora_B" in name:  # zero at the start, where A has no gradient
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape))
    client, batch = ResidualClient(half, blocks=2), _batch(padded)
    assert isinstance(next(iter(client._projections.values())), peft.tuners.lora.LoraLayer)
    assert all(".lora_" in name for name in client.trained)
    assert len(client.trained) == 2 * 2 * (1 if alone else 2)
    g = _gradient(client, batch)
    expected, before = _by_stream(client, batch, g), _weights(client)
    _step(client, batch, g)
    for name, p in client.trained.items():
        torch.testing.assert_close(p - before[name], -ETA * expected[name], rtol=1e-6, atol=1e-9)


def test_bfloat16_weights_move_by_the_float32_update_rounded_once(tiny, padded):
    client, batch = _client(tiny("opt", torch.bfloat16)), _batch(padded)
    g = _gradient(client, batch)
    before, update = _weights(client), client.feedback_gradients(batch, g)
    assert all(u.dtype == torch.float32 for u in update.values())
    _step(client, batch, g)
    for name, p in client.trained.items():
        assert torch.equal(p, (before[name].float() - ETA * update[name]).to(torch.bfloat16))


def test_an_extreme_gradient_changes_nothing(tiny, padded):
    client, batch = _client(tiny("llama")), _batch(padded)
    before = _weights(client)
    client.forward_keeping_inputs(batch)
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        client.descend_by_feedback(torch.full_like(client.forward(batch), 3e38), ETA)
    assert all(torch.equal(before[name], p) for name, p in client.half.named_parameters())


def test_a_family_without_a_row_is_refused(tiny):
    half, _ = split_model(tiny("llama"), 2)
    half._family = type(half._family)("unlisted", "causal", half.blocks_name, {}, {})
    with pytest.raises(SplitError, match="the layers of a block that write to the residual stream"):
        ResidualClient(half)


@pytest.mark.parametrize(
    ("family", "blocks"), [("llama", None), ("llama", 1), ("llama", 3), ("gemma2", 2), ("bert", 2)]
)
def test_backprop_can_train_the_same_matrices(tiny, family, blocks):
    """The ceiling of residual feedback in tables: exact gradients of these layers, `trainable: output-projections`."""
    trained = []
    for method, trainable in (("hosl-residual", "blocks"), ("fo-recompute", "output-projections")):
        config = parse_config(
            {
                "method": method, "model": {"cut": BLOCKS}, "residual": {"blocks": blocks},
                "client": {"trainable": trainable},
            },
            where="x",
        )  # fmt: skip
        trained.append(set(make_client(config, split_model(tiny(family), BLOCKS)[0]).trained))
    assert trained[0] == trained[1]
    if family == "llama":
        assert len(trained[0]) == 2 * (blocks or 2)  # half of the three blocks, rounded up


@pytest.mark.parametrize("dtype", ["model", "int8", "bfloat16"])
def test_adapters_on_some_of_the_layers_are_all_that_is_trained(tiny, dtype):
    lora = {"trainable": "lora", "dtype": dtype, "lora": {"target_modules": ["down_proj"]}}
    settings = {
        "method": "hosl-residual",
        "model": {"cut": BLOCKS},
        "residual": {"blocks": 2},
        "client": lora,
    }
    client = make_client(parse_config(settings, where="x"), split_model(tiny("llama"), BLOCKS)[0])
    assert len(client.trained) == 2 * 2
    assert all(".down_proj.lora_" in name for name in client.trained)
    adapters = {name for name, _ in client.half.named_parameters() if ".lora_" in name}
    assert adapters == set(client.trained)  # none in the block below, which is not trained


def test_slopes_are_refused_where_norms_stand_above_the_layers(tiny):
    config = parse_config({"method": "hosl-residual", "residual": {"slopes": "one"}}, where="x")
    with pytest.raises(ConfigError, match=r"residual\.slopes: one measures steps along g"):
        make_client(config, split_model(tiny("gemma2"), BLOCKS)[0])


@pytest.mark.parametrize(("slopes", "count"), [("one", 1), ("per-block", 2)])
def test_measured_slopes_project_the_exact_gradient_on_the_update(tiny, padded, slopes, count):
    """W moves by -eta (gradient . D / D . D) D, with D what residual feedback would take, of the layers together."""
    model, batch = tiny("llama", torch.float64), _batch(padded)
    decay = 0.5 if slopes == "one" else 1.0
    plain, half = _client(model, decay=decay), split_model(deepcopy(model), BLOCKS)[0]
    client = GuidedClient(half, blocks=2, slopes=slopes, decay=decay)
    g = _gradient(client, batch)
    (
        client.half(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()) * g
    ).sum().backward()
    exact, before = _taken(client), _weights(client)
    _step(plain, batch, g, eta=1.0)
    update = {name: before[name] - p.detach() for name, p in plain.trained.items()}
    result = hosl_residual_slopes_round(
        client, _Linear(g), batch, StepInputs(1, epsilon=1e-4, learning_rate=ETA)
    )
    assert len(result.coefficients) == count
    groups = [list(exact)] if count == 1 else [[n for n in exact if f".layers.{i}." in n] for i in (1, 2)]
    for names in groups:
        along = sum(float((exact[n] * update[n]).sum()) for n in names)
        squared = sum(float((update[n] ** 2).sum()) for n in names)
        for name in names:
            moved = client.trained[name].detach() - before[name]
            torch.testing.assert_close(moved, -ETA * along / squared * update[name], rtol=1e-2, atol=1e-8)


class TestAlignment:
    """How far the returned gradient is the gradient of the blocks below: `hosl plan --probe` says it."""

    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma2", "olmo2", "granite"])
    def test_cosines_are_those_of_autograd(self, padded, family):
        client, batch = _client(build(family, torch.float64), blocks=3), _batch(padded)
        g = _gradient(client, batch)
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
        (client.half(ids, mask) * g).sum().backward()
        exact = _taken(client)
        stream = _by_stream(client, batch, g)
        before = _weights(client)
        found = alignment(client, batch, g)
        assert [row.layer for row in found] == list(reversed(client._projections))
        for row in found:
            true, taken = exact[f"{row.layer}.weight"], stream[f"{row.layer}.weight"]
            cosine = nn.functional.cosine_similarity(true.flatten(), taken.flatten(), 0)
            assert row.cosine == pytest.approx(float(cosine), abs=1e-5)
            assert row.ratio == pytest.approx(float(true.norm() / taken.norm()), rel=1e-4)
        assert all(torch.equal(before[name], p) for name, p in client.half.named_parameters())
        assert all(p.grad is None for p in client.half.parameters())

    @pytest.mark.parametrize("family", ["opt", "opt-post-ln"])
    def test_it_is_whole_in_the_last_layer_and_falls_with_depth(self, tiny, padded, family):
        client, batch = _client(tiny(family, torch.float64), blocks=3), _batch(padded)
        rows = alignment(client, batch, _gradient(client, batch))
        assert rows[0].cosine == pytest.approx(1.0, abs=1e-6)  # nothing stands above the last layer
        writers = [row.cosine for row in rows if row.layer.endswith("fc2")]
        assert writers == sorted(writers, reverse=True)
        assert writers[-1] > 0.4

    def test_it_needs_a_gradient_that_has_reached_the_tokens(self):
        """Above the embedded encoder's last block only the first token has a gradient, which blocks below lack."""
        model = load_model("all-MiniLM-L6-v2", head="classification", num_labels=5, seed=0).model
        lowest, batch = {}, _batch_of_words(model)
        for cut in (4, 6):
            half, server = split_model(deepcopy(model), cut)
            client = ResidualClient(half, blocks=3)
            h = client.forward(batch).requires_grad_()
            loss = nn.functional.cross_entropy(
                server(h, torch.from_numpy(batch.targets.mask).long()), torch.arange(ROWS)
            )
            (g,) = torch.autograd.grad(loss, h)
            lowest[cut] = alignment(client, batch, g)[-2].cosine
        assert lowest[4] > 0.5
        assert lowest[6] < 0.3


def _batch_of_words(model):
    generator = np.random.Generator(np.random.Philox(0))
    ids = generator.integers(1000, model.config.vocab_size, (ROWS, 16))
    ids[:, 0] = 101
    return Batch(ids, ClassTargets(np.ones(ids.shape, np.int8), np.zeros(ROWS, np.int64)))


def test_trained_are_the_output_projections_of_the_last_blocks_and_their_norms(tiny):
    client = _client(tiny("gemma2"), blocks=1)
    assert (
        set(client.trained)
        == set(trained_parameters(client.half.model))
        == {
            f"model.layers.{BLOCKS - 1}.{name}.weight"
            for name in (
                "self_attn.o_proj",
                "mlp.down_proj",
                "post_attention_layernorm",
                "post_feedforward_layernorm",
            )
        }
    )
