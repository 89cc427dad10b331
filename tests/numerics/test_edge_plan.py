"""The memory that is planned for a client on the engine: against its process, and its figures among each other."""

import subprocess
import sys

import pytest

from hosl.bench.edge_memory import GRAPHS, engine_configs
from hosl.bench.isolated_edge_client import edge_client_alone
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.config import Config, parse_config
from hosl.errors import ModelError
from hosl.methods.variants import ON_ENGINE
from hosl.planner.edge_memory import (
    EDGE_BASE_BYTES,
    StoredShape,
    edge_shape,
    planned_memory,
    planned_process_bytes,
)
from hosl.planner.model_shape import model_shape
from hosl.planner.on_engine import shape_on_engine

WIDTH, WIDE, BLOCKS = 64, 256, 3


def half(itemsize=4, gated=False):
    """A client half of three blocks."""
    matrices = {"q": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "up": (WIDE, WIDTH), "down": (WIDTH, WIDE)}
    if gated:
        matrices["gate"] = (WIDE, WIDTH)
    parameters = {"table": StoredShape((1000, WIDTH), itemsize)}
    for index in range(BLOCKS):
        for name, shape in matrices.items():
            parameters[f"layers.{index}.{name}.weight"] = StoredShape(shape, itemsize)
    prefixes = [f"layers.{index}" for index in range(BLOCKS)]
    return edge_shape(parameters, prefixes, {"num_attention_heads": 4}, WIDTH, ("none", "causal"))


def config(method, **client):
    client = {"lora": {"target_modules": ["q", "v"]}} | client
    return parse_config({"method": method, "model": {"cut": BLOCKS}, "client": client}, where="of a test")


def planned(method, rows=8, tokens=16, of=None, **client):
    return planned_memory(config(method, **client), of or half(), rows, tokens)


def test_what_is_trained_moves_from_pages_of_files_to_the_process_own():
    block = sum(p.numbers for p in half().blocks[0].values()) * 4
    frozen, whole = planned("frozen"), planned("fo-recompute")
    last, lora = (planned("fo-recompute", trainable=which) for which in ("last-block", "lora"))
    assert frozen.read_bytes - whole.read_bytes == block
    assert whole.own_bytes - last.own_bytes >= (BLOCKS - 1) * block
    assert lora.process_bytes < last.process_bytes < whole.process_bytes
    for memory in (frozen, whole, last, lora):
        assert memory.process_bytes == memory.anonymous_bytes + memory.file_bytes
        assert memory.process_bytes == EDGE_BASE_BYTES + memory.tensor_bytes


def test_an_optimiser_keeps_one_or_two_numbers_of_each_adapter():
    adapters = BLOCKS * 2 * 2 * 8 * WIDTH * 4  # two layers a block, two matrices each, of rank 8
    plain, momentum, adamw = (
        planned("fo-recompute", trainable="lora", optimiser=optimiser)
        for optimiser in ({}, {"momentum": 0.9}, {"name": "adamw"})
    )
    assert momentum.own_bytes - plain.own_bytes == adapters
    assert adamw.own_bytes - plain.own_bytes == 2 * adapters


def test_memory_grows_with_rows_tokens_and_what_is_beside():
    for method in ("frozen", "hosl", "hosl-gradient", "fo-recompute"):
        small = planned(method).tensor_bytes
        assert planned(method, rows=64).tensor_bytes > small
        assert planned(method, tokens=64).tensor_bytes > small
        assert planned(method, of=half(gated=True)).tensor_bytes > small
        assert (
            planned(method, rows=64, micro_batch_size=1).tensor_bytes < planned(method, rows=64).tensor_bytes
        )
    assert planned("hosl").tensor_bytes > planned("hosl", trainable="lora").tensor_bytes
    narrow = planned("frozen", of=half(itemsize=2))
    assert narrow.read_bytes < planned("frozen").read_bytes  # half the pages, and a copy in float32
    assert narrow.own_bytes > planned("frozen").own_bytes
    wider = planned("hosl", trainable="all").own_bytes - planned("hosl").own_bytes
    assert wider >= 1000 * WIDTH * 4


def test_an_evaluation_is_planned_beside_what_training_holds():
    trained = sum(p.numbers for block in half().blocks for p in block.values()) * 4
    frozen = planned_memory(config("frozen"), half(), 8, 16)
    beside = planned_memory(config("fo-recompute"), half(), 8, 16, evaluation=True)
    block = frozen.read_bytes - beside.read_bytes
    assert beside.tensor_bytes == frozen.tensor_bytes + trained - block


def test_a_folder_without_graphs_is_not_planned(tmp_path):
    with pytest.raises(ModelError, match="has no graphs for an inference engine"):
        planned_process_bytes(Config(), tmp_path, 2, 4)


def test_a_plan_of_a_device_needs_no_torch():
    script = "import sys, hosl.planner.edge_memory, hosl.planner.edge_budget; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "rows", "tokens"), [(3, 16, 64), (2, 4, 256)])
def test_the_process_is_planned_within_a_tenth(tmp_path, cut, rows, tokens):
    sizes = BenchSizes("opt-125m", cut, rows, tokens)
    client = random_halves(sizes, tmp_path, GRAPHS) / "client"
    of_model = shape_on_engine(model_shape("opt-125m")).of_blocks(cut)
    for name, settings in engine_configs(sizes, 1, ON_ENGINE).items():
        found = edge_client_alone(settings, client, rows, tokens)
        expected = planned_process_bytes(settings, client, rows, tokens)
        print(
            f"{name}: {found['process_peak_bytes'] >> 20} MiB, planned {expected.process_bytes / 2**20:.0f}"
        )
        assert expected.process_bytes == pytest.approx(found["process_peak_bytes"], rel=0.1), name
        # the same without the folder: from the model's config
        assert planned_memory(settings, of_model, rows, tokens).process_bytes == pytest.approx(
            expected.process_bytes, rel=0.001
        )
