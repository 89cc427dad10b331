"""What the planner says of a step without data is what the step takes: every family, every way that plans compare."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from msgspec import structs

from hosl.config import Config, ModelConfig, ResidualConfig, parse_config
from hosl.core.methods import METHODS
from hosl.core.targets import Batch, ClassTargets, OptionTargets, positions_of, states_shape
from hosl.errors import ConfigError
from hosl.methods.step import method_round
from hosl.methods.synthetic import NoServer, fixed_batch
from hosl.methods.torch_parties import (
    DTYPES,
    make_client,
    make_head,
    make_server,
    party_bytes,
    trained_elements,
)
from hosl.methods.variants import VARIANTS
from hosl.parties.clients.residual import ResidualClient
from hosl.parties.engine.memory import TorchMemory
from hosl.parties.metered import Meter, metered, payload_bytes
from hosl.planner.costs import clean_pass, client_cost_at, client_memory, server_cost
from hosl.planner.dry_run import empty_, without_data, work_of
from hosl.planner.fakes import CountingServer
from hosl.planner.machine import assumed_cpu, assumed_server
from hosl.planner.model_shape import ModelShape, model_shape
from hosl.planner.plan import PLANNED, Demand, Question, most_needed, nearest_that_fits, plan, recommended
from hosl.split import split_model, split_u_shape
from hosl.split.shapes import random_model
from tests.conftest import MODELS, build

CUT, ROWS_, TOKENS, DIRECTIONS = 2, 6, 40, 4
BY_NAME = {row.name: row for row in VARIANTS}
WAYS = (
    *PLANNED,
    "hosl, low-rank",
    "hosl, first-plus",
    "hosl-residual",
    "zo-zo",
    "fo-fo, AdamW",
    "fo-fo, LoRA",
    "hosl-gradient, one-sided",
)


ID_BYTES = 8 * ROWS_ * TOKENS
"""Of a batch's token ids: a sixteenth of these tiny models' hidden states, nothing beside an ordinary model's."""


def shape_of(family, model):
    head = "classification" if type(model).__name__.endswith("ForSequenceClassification") else "causal"
    return ModelShape(family, model.config, head)


def measured(config, half):
    """The client after a step, its tensors' peak in the next, and what crossed in a third."""
    half.convert(DTYPES[config.model.dtype])
    client = make_client(config, half)
    batch, of_server = fixed_batch(client, ROWS_, TOKENS), Meter()
    method_round(config, client, NoServer(), batch, 1)
    memory = TorchMemory(party_bytes(client))
    memory.watch(method_round, config, client, NoServer(), batch, 2)
    method_round(config, client, metered(NoServer(), of_server), batch, 3)
    return client, memory.peak_bytes, of_server


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("scored", [pytest.param(0, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize(
    ("family", "way"),
    [("opt", "hosl"), ("llama", "hosl-gradient"), ("bert", "hosl-node"), ("llama", "fo-fo")],
)
def test_a_head_on_the_device_is_planned_as_it_is_measured(family, way, scored):
    """Weights once where they are tied, the head's optimiser, logits of all scored tokens, bytes of both directions."""
    model = build(family)
    config = BY_NAME[way].config(cut=CUT, directions=DIRECTIONS)
    config = structs.replace(config, wire=structs.replace(config.wire, labels="client"))
    shape = dataclasses.replace(shape_of(family, model), scored_tokens=0 if family == "bert" else scored)
    cost, traffic = client_cost_at(config, shape, ROWS_, TOKENS)
    half, _, head = split_u_shape(model, CUT)
    client = make_client(config, half)
    counting = CountingServer()
    server = make_head(config, head, client.half, counting)
    batch = fixed_batch(client, ROWS_, TOKENS, scored=shape.scored_tokens)
    if family == "bert":
        batch = Batch(batch.input_ids, ClassTargets(batch.targets.mask, np.zeros(ROWS_, np.int64)))
    method_round(config, client, server, batch, 1)
    memory = TorchMemory(party_bytes(client, server))
    counting.forget()
    memory.watch(method_round, config, client, server, batch, 2)
    assert cost.static_bytes == party_bytes(client, server)
    assert abs(cost.peak_bytes - memory.peak_bytes) <= 0.02 * memory.peak_bytes + 15 * ID_BYTES
    size = (ROWS_, TOKENS, shape.width)
    states = np.prod(states_shape(positions_of(batch.targets), shape.width)) * 4
    asked = payload_bytes(positions_of(batch.targets))
    probes = DIRECTIONS if way == "hosl" else 0
    upload = int(np.prod(size)) * 4
    assert traffic.bytes_up == (2 * probes + 1) * upload + (probes + 1) * asked + states
    assert traffic.bytes_down == (2 * probes + 1) * states + (0 if way == "hosl" else upload)
    assert server_cost(config, shape, ROWS_, TOKENS).trained == trained_elements(
        make_server(config, split_u_shape(build(family), CUT)[1], [])
    )


CASES = [(family, way) for family in MODELS for way in ("hosl-gradient", "fo-recompute")]
CASES += [
    (family, "hosl-node")
    if family in ("opt", "bert", "llama")
    else pytest.param(family, "hosl-node", marks=pytest.mark.slow)
    for family in MODELS
]
CASES += [(family, way) for family in ("opt", "bert") for way in WAYS if (family, way) not in CASES]
CASES += [
    (family, way)
    for family in ("bloom", "mpt", "falcon-alibi", "gpt_neo")
    for way in ("hosl-node", "fo-recompute")
]
CASES += [(family, "hosl-gradient") for family in ("modernbert", "deberta-v2", "opt (class)")]
EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss")
CASES += [(family, way) for family in EXPERTS for way in ("hosl-residual", "fo-fo")]
CASES += [("mixtral", way) for way in ("hosl", "hosl-gradient, int8 + LoRA", "hosl-node", "fo-recompute")]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("family", "way"), CASES)
def test_memory_bytes_and_trained_numbers_are_predicted(family, way):
    model = build(family)
    config = BY_NAME[way].config(cut=CUT, directions=DIRECTIONS)
    cost, traffic = client_cost_at(config, shape_of(family, model), ROWS_, TOKENS)
    client, peak_bytes, of_server = measured(config, split_model(model, CUT)[0])
    assert cost.static_bytes == party_bytes(client)
    assert cost.trained == trained_elements(client)
    # ids, positions and masks in int64 live a little longer when a step runs without data
    assert abs(cost.peak_bytes - peak_bytes) <= 0.02 * peak_bytes + 15 * ID_BYTES
    assert traffic.bytes_up == pytest.approx(of_server.bytes_in, rel=0.02)
    assert traffic.bytes_down == pytest.approx(of_server.bytes_out, rel=0.02)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("together", [None, 2])
def test_what_residual_feedback_keeps_follows_the_whole_batch_in_plan_and_client(monkeypatch, together):
    """On either side of the threshold, which many micro-batches cross where two do not."""
    chosen = []
    affordable = ResidualClient._affordable
    monkeypatch.setattr(
        ResidualClient, "_affordable", lambda *args: chosen.append(affordable(*args)) or chosen[-1]
    )
    shape = model_shape("tiny")
    config = BY_NAME["hosl-residual"].config(cut=4, directions=1, micro_batch_size=together)
    held = client_cost_at(config, shape, 1, 8)[0].static_bytes
    most = int(0.08 * held / (2 * shape.width * 4 * 8))  # two trained blocks, rows of 8 tokens
    assert most > 8
    for rows, kept in ((most, "blocks"), (most + 1, "stream")):
        chosen.clear()
        plan_, _ = client_cost_at(config, shape, rows, 8)
        assert set(chosen) == {kept}
        chosen.clear()
        client = make_client(config, split_model(random_model("tiny"), 4)[0])
        batch = fixed_batch(client, rows, 8)
        method_round(config, client, NoServer(), batch, 1)
        assert set(chosen) == {kept}
        memory = TorchMemory(party_bytes(client))
        memory.watch(method_round, config, client, NoServer(), batch, 2)
        assert plan_.peak_bytes == pytest.approx(memory.peak_bytes, rel=0.02)


@pytest.mark.usefixtures("unchecked")
def test_experts_are_counted_by_the_tokens_that_they_are_sent_together(tmp_path):
    """Two experts a token are twice the work of one, of weights that are all held; else memory follows the data."""
    models = [build("qwen3_moe", num_experts_per_tok=chosen) for chosen in (1, 2)]
    config = BY_NAME["frozen"].config(cut=CUT, directions=1)
    one, two = (client_cost_at(config, shape_of("qwen3_moe", model), ROWS_, TOKENS)[0] for model in models)
    of_experts = 2 * ROWS_ * TOKENS * 3 * 32 * 16  # gate, up and down
    assert flops(two.work) - flops(one.work) == CUT * of_experts
    assert (
        two.static_bytes
        == one.static_bytes
        == party_bytes(make_client(config, split_model(models[0], CUT)[0]))
    )
    forward_mode = BY_NAME["hosl-gradient, forward-mode"].config(cut=CUT, directions=1)
    with pytest.raises(ConfigError, match="forward-mode with experts: it takes them one by one"):
        client_cost_at(forward_mode, shape_of("qwen3_moe", models[0]), ROWS_, TOKENS)
    unlisted = transformers.OlmoeConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    unlisted.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no plan of a olmoe: how its experts share the tokens"):
        model_shape(str(tmp_path))


@pytest.mark.usefixtures("unchecked")
def test_what_a_probe_forms_is_counted_once_beside_a_head_with_state():
    """An optimiser that makes its state in its first step has that step run twice."""
    counts = []
    for server in ({"name": "sgd"}, {"name": "adamw"}):
        settings = {
            "method": "hosl",
            "model": {"cut": CUT},
            "zo": {"directions": 1},
            "wire": {"labels": "client"},
        }
        config = parse_config(settings | {"server": {"optimiser": server}}, where="test")
        counts.append(client_cost_at(config, shape_of("llama", build("llama")), ROWS_, TOKENS)[0].formed)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("optimiser", [{"name": "sgd", "momentum": 0.9}, {"name": "adamw"}])
def test_a_server_whose_optimiser_has_state_is_planned_with_it(optimiser):
    shape = shape_of("bert", build("bert"))
    plain, stateful = (
        server_cost(
            parse_config({"model": {"cut": CUT}, "server": {"optimiser": how}}, where="test"), shape, 4, 24
        )
        for how in ({"name": "sgd"}, optimiser)
    )
    states = 2 if optimiser["name"] == "adamw" else 1
    held = stateful.static_bytes - plain.static_bytes
    assert held == pytest.approx(states * 4 * plain.trained, rel=0.01)


def test_the_logits_of_every_token_are_planned_where_texts_are_learned():
    task = {"kind": "sft", "train": "rows.jsonl"}
    settings = {"method": "hosl-gradient", "model": {"cut": CUT}, "task": task, "wire": {"labels": "server"}}
    config = parse_config(settings, where="test")
    one = server_cost(
        structs.replace(config, task=Config().task), shape_of("llama", build("llama")), ROWS_, TOKENS
    )
    cost = server_cost(config, shape_of("llama", build("llama")), ROWS_, TOKENS)
    server = make_server(config, split_model(build("llama"), CUT)[1], [])
    h = torch.randn(ROWS_, TOKENS, 32, generator=torch.Generator().manual_seed(0))
    positions = np.tile(np.arange(TOKENS - 1, dtype=np.int32), (ROWS_, 1))
    mask = np.ones((ROWS_, TOKENS), np.int8)
    mask[0, 0] = 0
    targets = OptionTargets(mask, positions, np.full_like(positions, 5), "tokens")
    server.step(h, targets, step=1, want_gradient=True)
    memory = TorchMemory(party_bytes(server) + h.nbytes)
    memory.watch(server.step, h, targets, step=2, want_gradient=True)
    assert cost.peak_bytes == pytest.approx(memory.peak_bytes, rel=0.1)
    assert (
        cost.peak_bytes - one.peak_bytes > 4 * ROWS_ * (TOKENS - 2) * 97
    )  # the logits of all tokens but one


@pytest.mark.usefixtures("unchecked")
def test_the_authors_profile_is_planned_too():
    settings = {
        "profile": "authors-head",
        "method": "hosl",
        "zo": {"distribution": "sphere", "directions": 2},
    }
    settings |= {"model": {"cut": CUT}, "server": {"optimiser": {"name": "sgd", "momentum": 0.9}}}
    model, config = build("bert"), parse_config(settings, where="test")
    cost, _ = client_cost_at(config, shape_of("bert", model), ROWS_, TOKENS)
    client, peak_bytes, _ = measured(config, split_model(model, CUT)[0])
    assert cost.static_bytes == party_bytes(client)
    assert abs(cost.peak_bytes - peak_bytes) <= 0.02 * peak_bytes + 15 * ID_BYTES


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("way", ["fo-recompute", "fo-fo", "hosl-gradient"])
def test_memory_is_predicted_where_embeddings_are_trained(way):
    model = build("opt")
    config = BY_NAME[way].config(cut=CUT, directions=DIRECTIONS)
    config = structs.replace(config, client=structs.replace(config.client, trainable="all"))
    cost, _ = client_cost_at(config, shape_of("opt", model), ROWS_, TOKENS)
    client, peak_bytes, _ = measured(config, split_model(model, CUT)[0])
    assert cost.trained == trained_elements(client)
    assert abs(cost.peak_bytes - peak_bytes) <= 0.02 * peak_bytes + 15 * ID_BYTES


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("way", "blocks"),
    [
        *((way, None) for way in PLANNED),
        ("hosl-residual", "all"),
        *(
            pytest.param(way, blocks, marks=pytest.mark.slow)
            for way, blocks in [
                ("hosl-node", 3),
                ("hosl-node", 4),
                ("hosl-node", "all"),
                ("hosl-residual", 3),
                ("hosl", 4),
            ]
        ),
    ],
)
def test_many_cuts_follow_from_two(way, blocks):
    """The table's shortcut against the step at that very cut."""
    shape = model_shape("tiny").of_blocks(4 if blocks == 4 else 6)
    base = Config(residual=ResidualConfig(blocks=blocks), model=ModelConfig(cut=4))
    question = Question(
        shape=shape, base=base, rows=4, tokens=24, client=assumed_cpu(1), server=assumed_server(1.0)
    )
    left_out = []
    rows = plan(question, cuts=[2, 4], names=list(dict.fromkeys(("frozen", way))), say=left_out.append)
    assert not left_out
    least = blocks if isinstance(blocks, int) and METHODS[BY_NAME[way].method].needs_blocks else 1
    rows = [row for row in rows if row.name == way]
    assert [row.cut for row in rows] == [cut for cut in (2, 4) if cut >= least]
    rows = rows[-1:]
    with pytest.raises(ConfigError, match="nothing fits: the least is"):
        recommended([dataclasses.replace(row, fits=False) for row in rows], cut=4)
    for row in rows:
        exact, traffic = client_cost_at(row.config, shape, 4, 24)
        server = server_cost(row.config, shape, 4, 24)
        assert row.client.static_bytes == exact.static_bytes
        assert row.client.peak_bytes == pytest.approx(exact.peak_bytes, rel=0.02)
        assert flops(row.client.work) == pytest.approx(flops(exact.work), rel=1e-6)
        assert row.server.peak_bytes == pytest.approx(server.peak_bytes, rel=0.02)
        assert flops(row.server.work) == pytest.approx(flops(server.work), rel=1e-6)
        assert row.traffic == traffic
        static, peak, loading = client_memory(row.config, shape)(4, 24)
        assert (static, loading) == (exact.static_bytes, exact.loading_bytes)
        assert peak == pytest.approx(exact.peak_bytes, rel=0.02)


def flops(work):
    return sum(
        count * key.flops for counts in (work.products, work.attention) for key, count in counts.items()
    )


def test_arithmetic_is_counted_as_it_is_known_to_be():
    """A linear layer [rows, in] -> [rows, out]: 2 rows in out forward, twice that backward (two gradients)."""
    layer = torch.nn.Linear(32, 48, bias=False, device="meta")
    with without_data():
        empty_(layer)
        x = torch.empty(10, 32, requires_grad=True)
        forward = work_of(lambda: layer(x), [layer.weight, x])
        both = work_of(lambda: layer(x).sum().backward(), [layer.weight, x])
    assert flops(forward) == 2 * 10 * 32 * 48
    assert flops(both) == 3 * flops(forward)
    assert forward.peak_bytes == 10 * 48 * 4


def takes_of(shape, rows, eval_rows, tokens):
    known = {}

    def takes(config):
        if config not in known:
            batches = [(rows, config), (eval_rows, clean_pass(config))]
            known[config] = [
                Demand(n, lambda n=n, c=c: client_memory(c, shape)(n, tokens)[1]) for n, c in batches
            ]
        return known[config]

    return takes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("way", ["frozen", "hosl", "hosl-gradient", "hosl-node", "fo-recompute"])
def test_a_lower_limit_is_met_by_as_many_rows_at_once_as_fit(way):
    """What is named fits, at a twentieth below what does not, and at what one row at a time takes."""
    shape, base = model_shape("tiny"), BY_NAME[way].applied(Config(model=ModelConfig(name="tiny")), cut=3)
    takes = takes_of(shape, 16, 48, 64)
    needed = most_needed(takes(base))
    least = most_needed(takes(structs.replace(base, client=structs.replace(base.client, micro_batch_size=1))))
    for limit in (0.95 * needed, (needed + least) / 2, least):
        found = nearest_that_fits(base, 64, takes, limit)
        assert found.model.cut == 3
        assert most_needed(takes(found)) <= limit
    assert found.client.micro_batch_size < 48


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
def test_below_one_row_at_a_time_a_lower_cut_is_named():
    shape, base = model_shape("tiny"), Config(method="frozen", model=ModelConfig(cut=5))
    takes = takes_of(shape, 32, 48, 256)
    row_by_row = most_needed(
        takes(structs.replace(base, client=structs.replace(base.client, micro_batch_size=1)))
    )
    lower = nearest_that_fits(base, 256, takes, row_by_row - 1)
    assert lower.model.cut == 4
    assert most_needed(takes(lower)) <= row_by_row - 1
    assert nearest_that_fits(base, 256, takes, 1.0) is None
    guided = structs.replace(base, method="hosl-node", residual=structs.replace(base.residual, blocks=4))
    assert nearest_that_fits(guided, 256, takes, 1.0) is None  # cuts below 4 are no way out
