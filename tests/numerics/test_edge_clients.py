"""Clients on the inference engine against their torch twins and float64: activations, probes, updates, checkpoints."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from hosl.config import parse_config
from hosl.core.directions import DISTRIBUTIONS
from hosl.core.journal import Journal
from hosl.core.targets import Batch, ClassTargets
from hosl.errors import ConfigError, ModelError, NonFiniteError
from hosl.methods.torch_parties import make_client
from hosl.parties.edge.make import make_edge_client
from hosl.parties.edge.memory import ProcessMemory
from hosl.parties.edge.optimisers import EdgeOptimiser
from hosl.parties.edge.update import descend_
from hosl.parties.engine import perturbation
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.metered import MemoryMeter
from hosl.split import load_half
from hosl.split.reading.runtime_json import read_runtime_json
from hosl.split.reading.tensors import tensors_digest
from hosl.split.specs import GraphSpec
from hosl.system.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hosl.training import checkpointing, edge_checkpointing
from hosl.training.edge_checkpointing import trained_digest
from tests.exported import client_folder

ROWS, CUT, ETA = 5, 2, 0.5
OF_H, OF_UPDATE, OF_DIFFERENCE = 2e-6, 1e-5, 1e-4
"""Relative to the largest: of the activations; of the updates, to the half's largest; of h+ - h-, in norm."""
AS_FAR = 3
"""Where ReLU has kinks or norms round coarsely: the times that it may be as far from float64 as float32 torch is."""

USUAL = ("bert", pytest.param("llama", marks=pytest.mark.slow))
"""Post-LN and pre-LN; other families are in the slow product, whose graphs take an hour to make."""
TARGETS = {"llama": ("o_proj", "down_proj"), "bert": ("dense",), "gpt2": ("c_proj",)}
"""Layers with adapters: those that residual feedback trains, too."""
MANY = (
    "opt", "opt-post-ln", "opt-projections", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2",
    "gemma3", "phi3", "bert", "roberta", "distilbert",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:fan_in_fan_out"
)


@pytest.fixture(params=USUAL)
def folder(request):
    """A client half with graphs, of each usual family."""
    return _folder(request.config, request.param)


def _folder(config, name, cut=CUT):
    return client_folder(
        config, name, cut, GraphSpec(lora_targets=TARGETS.get(name, ()), int8=name in TARGETS)
    )


def _lora(folder, r=3):
    """The section of adapters on the layers that a folder's graphs adapt."""
    facts = read_runtime_json(folder)
    return {"trainable": "lora", "lora": {"r": r, "alpha": 5, "target_modules": list(facts.lora.targets)}}


def _batch(padded, side="right", rows=ROWS, width=11):
    ids, mask = padded(side, rows=rows, width=width)
    return Batch(ids.numpy(), ClassTargets(mask.numpy().astype(np.int8), np.zeros(rows, np.int64)))


def _config(method="fo-recompute", cut=CUT, **sections):
    sections = {"model": {"cut": cut}, "client": {}, **sections}
    return parse_config({"method": method, "seed": 7, **sections}, where="of a test")


def _twins(folder, config, dtype=torch.float32):
    """The client on the engine, and on torch from the same folder; each at its base weights."""
    half = load_half(folder, torch.float32)
    client = make_client(config, half)
    if dtype != torch.float32:
        client = deepcopy(client)
        client.half.to(dtype)
    return make_edge_client(config, folder), client


def _gradient(shape, seed=0):
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(shape)
    return (values / np.prod(shape[1:])).astype(np.float32)


def _weights(client):
    return {
        name: np.array(p.detach() if isinstance(p, torch.Tensor) else p, np.float64)
        for name, p in client.trained.items()
    }


def _moved(client, before):
    return {name: weight - before[name] for name, weight in _weights(client).items()}


def _off(found, expected):
    """The largest difference of two sets of updates, over the largest expected one."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(update).max() for update in expected.values())
    return max(np.abs(found[name] - expected[name]).max() for name in expected) / largest


def _relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def _move_adapters_(*parties):
    """Adapters away from their start, where B is zero and A has no gradient; all start alike."""
    starts = [_weights(party) for party in parties]
    for party, start in zip(parties, starts, strict=True):
        for name, weight in party.trained.items():
            if ".lora_" in name:
                np.testing.assert_array_equal(start[name], starts[0][name])
                random = np.random.Generator(np.random.Philox(len(name)))
                values = (random.standard_normal(tuple(weight.shape)) * 0.1).astype(np.float32)
                if isinstance(weight, torch.Tensor):
                    weight.data.copy_(torch.from_numpy(values))
                else:
                    weight[:] = values


def _exact_step(client, batch, gradient, rate=ETA):
    """h and the updates of one step of exact gradients, or of residual feedback."""
    before = _weights(client)
    if hasattr(client, "descend_by_feedback"):
        forward, descend = client.forward_keeping_inputs, client.descend_by_feedback
    else:
        forward, descend = client.forward_for_backward, client.backward
    h = np.array(forward(batch), np.float64)
    on_torch = isinstance(next(iter(client.trained.values())), torch.Tensor)
    descend(torch.from_numpy(gradient) if on_torch else gradient, rate)
    return h, _moved(client, before)


def _check_step(folder, config, batch):
    """One step on the engine is torch's, or not much farther from float64 than torch's in float32."""
    edge, client = _twins(folder, config)
    _move_adapters_(edge, client)
    gradient = _gradient(client.forward(batch).shape)
    asked = gradient.copy()
    h, updates = _exact_step(client, batch, gradient)
    edge_h, edge_updates = _exact_step(edge, batch, gradient)
    np.testing.assert_array_equal(gradient, asked)  # it is the server's, which may give it again
    assert _relative(edge_h, h) <= OF_H
    if _off(edge_updates, updates) > OF_UPDATE:
        _, exact_client = _twins(folder, config, torch.float64)
        _move_adapters_(exact_client)
        _, exact = _exact_step(exact_client, batch, gradient.astype(np.float64))
        assert _off(edge_updates, exact) <= AS_FAR * _off(updates, exact)


def _check_probes(folder, config, batch, names=None):
    """h+ - h- of a direction is torch's; two updates and a replay of their journal have torch's bits."""
    edge, client = _twins(folder, config)
    for sides, edge_sides in zip(
        client.probes(batch, [3, 4], 1e-3), edge.probes(batch, [3, 4], 1e-3), strict=True
    ):
        difference, edge_difference = (sides[0] - sides[1]).numpy(), edge_sides[0] - edge_sides[1]
        assert np.linalg.norm(edge_difference - difference) <= OF_DIFFERENCE * np.linalg.norm(difference)
    for party in (edge, client):
        party.descend(1, [3, 4], [0.5, -2.0], 1e-2)
        party.descend(2, [9], [1.5], 1e-2)
    assert edge.journal.to_bytes() == client.journal.to_bytes()
    expected = tensors_digest({name: p.detach() for name, p in client.trained.items()})
    assert trained_digest(edge) == expected
    again, _ = _twins(folder, config)
    again.replay(Journal.from_bytes(edge.journal.to_bytes()))
    assert trained_digest(again) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_frozen_client_gives_torchs_activations(folder, side, padded):
    edge, client = _twins(folder, _config("frozen"))
    batch = _batch(padded, side)
    h = client.forward(batch).numpy()
    found = edge.forward(batch)
    assert found.dtype == np.float32
    assert found.shape == h.shape
    assert _relative(found, h) <= OF_H
    few = make_edge_client(_config("frozen", client={"micro_batch_size": 2}), folder)
    np.testing.assert_array_equal(few.forward(batch), found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("trainable", ["blocks", "last-block", "output-projections"])
def test_an_exact_step_is_torchs(folder, trainable, side, padded):
    _check_step(folder, _config(client={"trainable": trainable}), _batch(padded, side))


@pytest.mark.parametrize("dtype", ["model", "int8"])
@pytest.mark.parametrize("method", ["fo-recompute", "hosl-residual"])
def test_adapters_step_as_torchs_over_float_and_int8_weights(method, dtype, folder, padded):
    config = _config(method, client={**_lora(folder), "dtype": dtype}, residual={"blocks": 2})
    _check_step(folder, config, _batch(padded))


@pytest.mark.parametrize("dtype", ["model", "int8"])
def test_probes_of_adapters_are_torchs(dtype, folder, padded):
    _check_probes(folder, _config("hosl", client={**_lora(folder), "dtype": dtype}), _batch(padded))


def test_a_frozen_int8_client_gives_torchs_activations(folder, padded):
    edge, client = _twins(folder, _config("frozen", client={"dtype": "int8"}))
    assert _relative(edge.forward(_batch(padded)), client.forward(_batch(padded)).numpy()) <= OF_H


@pytest.mark.parametrize("kept", ["auto", "stream", "blocks"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_residual_feedback_is_torchs(blocks, kept, folder, padded):
    config = _config("hosl-residual", residual={"blocks": blocks, "kept": kept, "decay": 0.5})
    if kept == "stream" and "bert" in str(folder):
        with pytest.raises(ConfigError, match=r"residual\.kept: stream"):
            make_edge_client(config, folder)
        return
    _check_step(folder, config, _batch(padded))


@pytest.mark.parametrize("method", ["hosl-residual", "fo-recompute"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_client_goes_on_from_its_optimisers_state(name, method, folder, padded, tmp_path):
    """Of exact gradients adapters alone: the bias of keys has one of 0, which AdamW makes steps of from rounding."""
    optimiser = {"name": name, "weight_decay": 0.01} | ({"momentum": 0.9} if name == "sgd" else {})
    trained = _lora(folder) if method == "fo-recompute" else {}
    config, batch = _config(method, client={"optimiser": optimiser, **trained}), _batch(padded)
    edge, client = _twins(folder, config)
    g = _gradient(client.forward(batch).shape)
    before = _weights(client)
    for party in (edge, client):
        for step in range(2):
            _exact_step(party, batch, g * (1 + step), 0.01)
    checkpoint = Checkpoint(step=2)
    edge_checkpointing.put_client(checkpoint, edge, snapshot_step=0, snapshot_steps=100)
    path = write_checkpoint(tmp_path, checkpoint)
    on_torch, again = make_client(config, load_half(folder, torch.float32)), make_edge_client(config, folder)
    checkpointing.restore_client_(on_torch, read_checkpoint(path))
    edge_checkpointing.restore_client_(again, read_checkpoint(path, arrays=True))
    for party in (edge, client, on_torch, again):
        _exact_step(party, batch, g, 0.01)
    assert trained_digest(again) == trained_digest(edge)
    expected = _moved(client, before)
    for party in (edge, on_torch):
        assert _off(_moved(party, before), expected) <= (OF_UPDATE if name == "sgd" else 1e-3)


@pytest.mark.slow  # of a pre-LN model
@pytest.mark.parametrize(("slopes", "decay"), [("one", 0.5), ("per-block", 1.0)])
def test_measured_slopes_are_torchs(slopes, decay, request, padded):
    folder, batch = _folder(request.config, "llama"), _batch(padded)
    config = _config("hosl-residual", residual={"blocks": 2, "slopes": slopes, "decay": decay})
    edge, client = _twins(folder, config)
    g, before, found = _gradient(client.forward(batch).shape), _weights(client), []
    for party, gradient in ((edge, g), (client, torch.from_numpy(g))):
        party.forward_keeping_inputs(batch)
        names = party.guide(gradient)
        found.append({name: party.slope(name, gradient, 1e-3) for name in names})
        party.descend_along(names, [found[-1][name] for name in names], ETA)
    assert list(found[0]) == list(found[1])
    largest = max(map(abs, found[1].values()))
    for name, slope in found[1].items():
        assert found[0][name] == pytest.approx(slope, abs=1e-3 * largest)  # two roundings of h over epsilon
    assert _off(_moved(edge, before), _moved(client, before)) <= 1e-3


def test_slopes_are_refused_where_norms_stand_between(request):
    with pytest.raises(ConfigError, match=r"residual\.slopes: one"):
        make_edge_client(
            _config("hosl-residual", residual={"slopes": "one"}), _folder(request.config, "bert")
        )


def test_feedback_that_is_no_number_changes_nothing(folder, padded):
    edge = make_edge_client(_config("hosl-residual"), folder)
    before, batch = trained_digest(edge), _batch(padded)
    for wrong in (np.nan, np.inf, 1e30):
        h = edge.forward_keeping_inputs(batch)
        with pytest.raises(NonFiniteError):
            edge.descend_by_feedback(np.full_like(h, wrong), 0.1)
    assert trained_digest(edge) == before


def test_micro_batches_change_rounding_alone(folder, padded):
    batch, found = _batch(padded), []
    for at_once in (1, 2, ROWS):
        edge = make_edge_client(_config(client={"micro_batch_size": at_once}), folder)
        found.append(_exact_step(edge, batch, _gradient(edge.forward(batch).shape)))
    for h, updates in found[1:]:
        np.testing.assert_array_equal(h, found[0][0])
        assert _off(updates, found[0][1]) <= OF_UPDATE


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("trainable", ["blocks", "last-block", "all"])
def test_probes_are_torchs_and_updates_have_its_bits(folder, distribution, trainable, padded):
    config = _config("hosl", zo={"distribution": distribution}, client={"trainable": trainable})
    _check_probes(folder, config, _batch(padded))


def test_projections_are_those_of_torch(folder, padded):
    edge, client = _twins(folder, _config("hosl-gradient", client={"micro_batch_size": 2}))
    batch, seeds = _batch(padded), [3, 4, 5]
    clean, edge_clean = client.forward(batch), edge.forward(batch)
    g = _gradient(clean.shape)
    pairs = [
        (
            client.projections(batch, seeds, 1e-3, torch.from_numpy(g)),
            edge.projections(batch, seeds, 1e-3, g),
        ),
        (
            client.one_sided_projections(batch, clean, seeds, 1e-3, torch.from_numpy(g)),
            edge.one_sided_projections(batch, edge_clean, seeds, 1e-3, g),
        ),
    ]
    for expected, found in pairs:
        for one, other in zip(expected, found, strict=True):
            largest = max(np.abs(one.rows).max(), one.noise)
            np.testing.assert_allclose(other.rows, one.rows, rtol=0, atol=20 * one.noise + 1e-4 * largest)
            assert other.noise == pytest.approx(one.noise, rel=1e-4)


def test_probes_only_read_the_weights(folder, padded):
    edge = make_edge_client(_config("hosl", client={"trainable": "all"}), folder)
    before = trained_digest(edge)
    list(edge.probes(_batch(padded), [1, 2], 1e-3))
    assert trained_digest(edge) == before


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_an_update_along_directions_has_torchs_bits(distribution):
    random = np.random.Generator(np.random.Philox(1))
    shapes = {"a.weight": (70, 33), "b.bias": (513,), "c.table": (600, 512), "d.scalar": (1,)}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    on_torch = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in weights.items()}
    for scales in ([0.3, -1e-3, 2.0], [1e-5, 1e-7, -3e-6]):
        perturbation.descend_(on_torch, [1, 2, 3], scales, distribution)
        descend_(weights, [1, 2, 3], scales, distribution)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, on_torch[name].detach().numpy())


@pytest.mark.parametrize(
    "spec",
    [
        OptimiserSpec(), OptimiserSpec(weight_decay=0.1), OptimiserSpec(momentum=0.9, weight_decay=0.01),
        OptimiserSpec(name="adamw"), OptimiserSpec(name="adamw", weight_decay=0.1),
    ],
    ids=str,
)  # fmt: skip
def test_optimisers_are_torchs_within_rounding(spec):
    random = np.random.Generator(np.random.Philox(2))
    weights = {"a": random.standard_normal((7, 5)).astype(np.float32), "b": np.ones(9, np.float32)}
    on_torch = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in weights.items()}
    before = {name: w.copy() for name, w in weights.items()}
    theirs, ours = make_optimiser(spec, on_torch.values()), EdgeOptimiser(spec)
    for step in range(5):
        gradients = {n: random.standard_normal(w.shape).astype(np.float32) for n, w in weights.items()}
        if step == 2:
            del gradients["b"]  # a weight without a gradient stays, and so does its state
        for name, p in on_torch.items():
            p.grad = torch.from_numpy(gradients[name].copy()) if name in gradients else None
        optimiser_step(theirs, 0.01 * (step + 1))
        ours.step_(weights, gradients, 0.01 * (step + 1))
    for name, weight in weights.items():
        largest = np.abs(weight - before[name]).max()
        np.testing.assert_allclose(
            weight, on_torch[name].detach().numpy(), rtol=0, atol=2e-6 * largest + 2e-7
        )
        state = {entry: value for entry, value in theirs.state[on_torch[name]].items() if value is not None}
        assert ours.state.get(name, {}).keys() == state.keys()
        for entry, value in state.items():
            np.testing.assert_allclose(ours.state[name][entry], np.array(value), rtol=1e-5, atol=1e-7)
    with pytest.raises(NonFiniteError):
        ours.step_(weights, {"a": np.full((7, 5), np.inf, np.float32)}, 0.1)


@pytest.mark.parametrize("method", ["fo-recompute", "hosl"])
def test_a_checkpoint_goes_from_either_runtime_to_the_other(method, folder, padded, tmp_path):
    config = _config(method, zo={"distribution": "sphere"})
    edge, client = _twins(folder, config)
    batch = _batch(padded)
    if method == "hosl":
        edge.descend(1, [3, 4], [0.5, -2.0], 1e-2)
    else:
        _exact_step(edge, batch, _gradient(edge.forward(batch).shape))
    checkpoint = Checkpoint(step=1)
    edge_checkpointing.put_client(checkpoint, edge, snapshot_step=0, snapshot_steps=1)
    path = write_checkpoint(tmp_path, checkpoint)
    assert checkpointing.restore_client_(client, read_checkpoint(path)) == (1 if method == "hosl" else 0)
    digest = tensors_digest({name: p.detach() for name, p in client.trained.items()})
    assert digest == trained_digest(edge)
    from_torch = Checkpoint(step=2)
    checkpointing.put_client(from_torch, client, snapshot_step=0, snapshot_steps=100)
    path = write_checkpoint(tmp_path, from_torch)
    for arrays in (True, False):
        again = make_edge_client(config, folder)
        edge_checkpointing.restore_client_(again, read_checkpoint(path, arrays=arrays))
        assert trained_digest(again) == digest
        np.testing.assert_array_equal(again.forward(batch), edge.forward(batch))


def test_the_memory_of_calls_is_that_of_the_process():
    meter = ProcessMemory()
    assert isinstance(meter, MemoryMeter)
    held = meter.static_bytes
    assert meter.watch(lambda: float(np.ones(1 << 23, np.float64).sum())) == 1 << 23
    assert held + (1 << 25) < meter.peak_bytes
    assert meter.static_bytes < meter.peak_bytes


def test_importing_the_clients_imports_neither_torch_nor_an_engine():
    script = (
        "import sys, hosl.parties.edge.make, hosl.training.edge_checkpointing, hosl.parties.edge.memory; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'onnx', 'safetensors.torch'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"method": "fo-fo"}, "method: fo-fo"),
        ({"method": "hosl-gradient", "zo": {"derivative": "forward-mode"}}, "zo.derivative: forward-mode"),
        ({"method": "hosl-node"}, "method: hosl-node"),
        ({"method": "hosl-residual", "residual": {"kept": "inputs"}}, "residual.kept: inputs"),
        ({"method": "frozen", "model": {"cut": CUT, "dtype": "bfloat16"}}, "model.dtype: bfloat16"),
        ({"method": "fo-recompute", "client": {"trainable": "all"}}, "client.trainable: all"),
        ({"method": "fo-recompute", "client": {"device": "cuda"}}, "client.device: cuda"),
        (
            {"method": "fo-recompute", "client": {"dtype": "bfloat16", "trainable": "lora"}},
            "client.dtype: bfloat16",
        ),
        ({"method": "fo-recompute", "client": {"trainable": "lora"}}, "client.lora.target_modules: null"),
        (
            {
                "method": "fo-recompute",
                "client": {"trainable": "lora", "lora": {"target_modules": ["no_proj"]}},
            },
            "client.lora.target_modules: no_proj",
        ),
    ],
)
def test_what_the_engine_has_not_is_refused_by_name(sections, named, request):
    folder = _folder(request.config, "bert")
    with pytest.raises(ConfigError) as refusal:
        make_edge_client(_config(**sections), folder)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_damaged_folder_is_refused_in_one_line(request, tmp_path):
    folder, config = _folder(request.config, "bert"), _config()
    for name in ("model.safetensors", "onnx/block-0.onnx", "onnx/prelude.onnx", "onnx/base-int8.safetensors"):
        other = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, other)
        content = (other / name).read_bytes()
        for damaged in (content[:-5], content[:-1] + bytes([content[-1] ^ 1]), b""):
            (other / name).write_bytes(damaged)
            with pytest.raises(ModelError) as refusal:
                make_edge_client(config, other)
            assert "\n" not in str(refusal.value)
    facts = json.loads((folder / "onnx" / "runtime.json").read_text())
    changes = {"minimum_onnxruntime": "999.0", "client_digest": "0" * 64, "format": 99, "kinds": {}}
    for number, (key, value) in enumerate(changes.items()):
        other = tmp_path / str(number)
        shutil.copytree(folder, other)
        (other / "onnx" / "runtime.json").write_text(json.dumps(facts | {key: value}))
        with pytest.raises(ModelError) as refusal:
            make_edge_client(config, other)
        assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", MANY)
def test_every_family_at_every_cut(name, cut, side, padded, request, unchecked):
    folder, batch = _folder(request.config, name, cut), _batch(padded, side)
    _check_step(folder, _config("hosl-residual", cut=cut, residual={"blocks": "all"}), batch)
    _check_step(folder, _config(cut=cut), batch)
    _check_step(folder, _config(cut=cut, client={"trainable": "last-block"}), batch)
    for distribution in DISTRIBUTIONS:
        _check_probes(folder, _config("hosl", cut=cut, zo={"distribution": distribution}), batch)
