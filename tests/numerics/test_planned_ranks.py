"""The plan of a server half over several ranks against ranks that are at work."""

import msgspec
import numpy as np
import pytest
import torch

from hosl.config import parse_config
from hosl.core.targets import OptionTargets
from hosl.errors import ConfigError
from hosl.parties.remote.torch_wire import to_wire
from hosl.planner.machine import assumed_server
from hosl.planner.model_shape import model_shape
from hosl.planner.server_ranks import RankSpeed, rank_costs, recommended_layout
from tests.ranks import (
    follow_watched_step,
    halves_of,
    layout,
    on_ranks,
    planned_work,
    questions,
    settings,
    watched_step,
)

SPEED = RankSpeed(machine=assumed_server(10.0), between_bytes_per_s=1e9)
WIDE = {
    "hidden_size": 512,
    "word_embed_proj_dim": 512,
    "ffn_dim": 2048,
    "vocab_size": 8192,
    "num_hidden_layers": 7,
}
WIDE |= {"num_attention_heads": 8, "max_position_embeddings": 128}


def costs_of(config, model, ranks, rows, tokens):
    return rank_costs(config, model_shape(str(model)), rows, tokens, ranks=ranks, speed=SPEED)


def cost_of(config, model, the_layout, rows, tokens):
    costs = costs_of(config, model, the_layout.ranks, rows, tokens)
    return next(cost for cost in costs if cost.layout == the_layout)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("trained", "keep"),
    [("all", False), pytest.param("all", True, marks=SLOW), pytest.param("lora", False, marks=SLOW)],
)
def test_what_a_rank_holds_and_gathers_is_as_planned(tmp_path, trained, keep):
    server = halves_of(tmp_path, "opt")
    config = settings("opt", trained, "adamw", method="hosl")
    the_layout = layout(2, keep_gathered=keep)
    held, gathers = on_ranks(planned_work, the_layout, server, config, questions("opt", 4))
    planned = cost_of(config, tmp_path / "opt-in", the_layout, 4, 7)
    # 97 rows make 49 on either rank: what is gathered is a little more than the weights
    assert planned.gathers == pytest.approx(gathers, rel=0.02)
    steps = (
        4 * 40
    )  # torch counts the steps of every weight in a tensor of its own, which is whole on every rank
    assert planned.held_bytes == pytest.approx(held, abs=steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "per_copy", "keep", "trained", "optimiser"),
    [
        (2, 2, False, "all", "adamw"), (2, 2, True, "all", "sgd"), (2, 1, False, "all", "adamw"),
        (4, 2, False, "all", "sgd"), (4, 4, False, "all", "adamw"), (2, 2, False, "lora", "adamw"),
    ],
)  # fmt: skip
def test_the_peak_of_every_rank_is_within_a_tenth_of_the_plan(
    tmp_path, ranks, per_copy, keep, trained, optimiser
):
    server, out = halves_of(tmp_path, "opt", "wide", **WIDE), tmp_path / "peaks"
    out.mkdir()
    config = settings("opt", trained, optimiser, method="hosl-gradient")
    the_layout = layout(ranks, per_copy, keep_gathered=keep)
    generator, asked = np.random.default_rng(0), []
    for _ in range(3):
        h = generator.normal(0, 1, (8, 64, 512)).astype(np.float32)
        mask = np.ones((8, 64), np.int8)
        mask[0, 0] = 0
        places = np.full((8, 1), 61, np.int32), np.full((8, 1), 5, np.int32)
        asked.append((to_wire(torch.from_numpy(h)), OptionTargets(mask, *places)))
    warm = halves_of(tmp_path, "opt")
    on_ranks(watched_step, the_layout, server, config, warm, asked, out, followers=follow_watched_step)
    measured = max(int((out / str(rank)).read_text()) for rank in range(ranks))
    planned = cost_of(config, tmp_path / "wide-in", the_layout, 8, 64).peak_bytes
    other_bytes = 9 << 20  # gloo's buffers, Python's own objects, pages that are begun
    assert 0.9 * planned < measured < 1.1 * planned + other_bytes, (measured, planned)


def test_the_fastest_layout_that_fits_is_recommended():
    config = parse_config({"method": "hosl", "model": {"name": "opt-125m", "cut": 5}}, where="test")
    costs = costs_of(config, "opt-125m", 4, 8, 64)
    whole, pairs, one, pairs_kept, kept = costs
    assert [c.layout.per_copy for c in costs] == [1, 2, 4, 2, 4]
    assert [c.layout.keep_gathered for c in costs] == [False, False, False, True, True]
    assert whole.peak_bytes > pairs.peak_bytes > kept.peak_bytes > one.peak_bytes
    # a gather and a part of the sum are as many bytes as the sum over all: the smaller of both is taken
    assert kept.exchanged_bytes == pytest.approx(whole.exchanged_bytes)
    assert kept.compute_s < pairs_kept.compute_s < whole.compute_s  # a rank updates what it holds
    assert recommended_layout(costs, None)[0] is kept
    assert recommended_layout(costs, kept.needed_bytes - 1)[0] is one
    nothing, why = recommended_layout(costs, one.needed_bytes - 1)
    assert nothing is None
    assert why.startswith("nothing fits: the least is --ranks 4 with ")


def test_exchanges_are_those_of_the_ring_by_hand(tmp_path):
    halves_of(tmp_path, "opt")
    config = settings("opt", "all", "sgd", method="hosl-gradient")
    whole, pairs, one, _, kept = costs_of(config, tmp_path / "opt-in", 4, 8, 7)
    weights = whole.held_bytes  # SGD has no state, and this half no buffers
    h_bytes = 8 * 7 * 32 * 4
    found = [
        cost.exchanged_bytes - 3 / 4 * h_bytes for cost in (whole, one, kept, pairs)
    ]  # dL/dh of others' rows
    assert found == [
        2 * 3 / 4 * weights,  # one sum over four
        3 / 4 * (2 + 1) * weights,  # forward, backward, and their parts of the sum
        3 / 4 * (1 + 1) * weights,
        1 / 2 * (2 + 1) * weights + 2 * 1 / 2 * weights / 2,
    ]
    assert {cost.told_bytes for cost in (whole, pairs, one, kept)} == {h_bytes}
    half = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, dtype="bfloat16"))
    whole16, *_, kept16 = costs_of(half, tmp_path / "opt-in", 4, 8, 7)
    assert whole16.exchanged_bytes == 2 * 3 / 4 * weights + 3 / 4 * h_bytes / 2  # sums are of float32
    assert kept16.exchanged_bytes == 3 / 4 * (1 / 2 + 1) * weights + 3 / 4 * h_bytes / 2
    probing = cost_of(settings("opt", method="hosl"), tmp_path / "opt-in", layout(4), 8, 7)
    assert probing.told_bytes == (2 * 16 + 1) * h_bytes
    first = settings("opt", method="hosl")
    first = msgspec.structs.replace(
        first, zo=msgspec.structs.replace(first.zo, server_gradient_at="first-plus")
    )
    at_first = cost_of(first, tmp_path / "opt-in", layout(4), 8, 7)
    assert at_first.told_bytes == 2 * 16 * h_bytes
    assert (probing.gathers, at_first.gathers) == (34, 33)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": "zo-zo"}, "is probed"),
        (
            {"clients": {"server": "personal", "count": 2}, "server": {"trainable": "lora"}},
            "adapters for each device",
        ),
    ],
)
def test_servers_of_one_process_are_refused(tmp_path, more, said):
    config = parse_config({"model": {"name": "opt-125m", "cut": 5}, **more}, where="test")
    with pytest.raises(ConfigError, match=said):
        rank_costs(config, model_shape("opt-125m"), 4, 8, ranks=2, speed=SPEED)
