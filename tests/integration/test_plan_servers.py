"""`hosl plan` about the server's side: several ranks, adapters of each device, adapters alone."""

import json

import pytest
import torch

from hosl.cli import main
from hosl.config import parse_config
from hosl.methods.torch_parties import make_server, party_bytes
from hosl.planner.costs import server_cost
from hosl.planner.model_shape import model_shape
from hosl.split import split_model
from tests.conftest import build

TINY = ("tiny", "--cuts", "2", "--tokens", "8", "--ways", "frozen; hosl")


def planned(capsys, *words):
    assert main(["plan", *TINY, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_layouts_of_ranks_are_planned_for_the_recommended_row(capsys):
    found = planned(capsys, "--ranks", "4", "--between-ranks", "8gbit")["server_ranks"]
    assert found["between_ranks_bytes_per_s"] == 1e9
    assert [layout["options"] for layout in found["layouts"]] == [
        "--ranks 4 --ranks-per-copy 1", "--ranks 4 --ranks-per-copy 2", "--ranks 4",
        "--ranks 4 --ranks-per-copy 2 --keep-gathered", "--ranks 4 --keep-gathered",
    ]  # fmt: skip
    assert found["recommended"] in found["layouts"]
    assert all(layout["fits"] for layout in found["layouts"])
    least = min(layout["tensor_peak_bytes"] for layout in found["layouts"])
    small = planned(capsys, "--ranks", "4", "--rank-memory", f"{least}B")["server_ranks"]
    assert small["recommended"]["tensor_peak_bytes"] == least
    none = planned(capsys, "--ranks", "4", "--rank-memory", f"{least // 2}B")["server_ranks"]
    assert none["recommended"] is None
    assert none["why"].startswith("nothing fits: the least is --ranks 4")
    assert "server_ranks" not in planned(capsys, "--ranks", "4", "--device-memory", "1KiB")
    assert main(["plan", *TINY, "--ranks", "4"]) == 0
    shown = capsys.readouterr().out
    assert "its server half over 4 ranks (cut 2, hosl)" in shown
    assert sum(line.startswith("->") for line in shown.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rank-memory", "8GiB"), "hosl plan --rank-memory is about the processes of --ranks N"),
        (("--between-ranks", "1gbit"), "hosl plan --between-ranks is about the processes of --ranks N"),
        (("--ranks", "1"), "--ranks 1: several are two or more"),
        (("--ranks", "0"), "--ranks 0: several are two or more"),
        (
            ("--ranks", "2", "--server.trainable", "lora", "--clients.server", "personal", "--clients.count", "2"),
            "adapters for each device",
        ),
        (("--ranks", "2", "--wire.labels", "client"), "has one process"),
    ],
)  # fmt: skip
def test_what_no_ranks_can_serve_is_refused(capsys, words, said):
    assert main(["plan", *TINY, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_plan_says_what_the_adapters_of_each_device_take(capsys):
    personal = ("--server.trainable", "lora", "--clients.server", "personal", "--clients.count", "40")
    personal += ("--server.optimiser.name", "adamw")
    way = planned(capsys, *personal)["ways"][0]
    adapters = parse_config(
        {
            "model": {"name": "tiny", "cut": 2},
            "server": {"trainable": "lora", "optimiser": {"name": "adamw"}},
        },
        where="test",
    )
    cost = server_cost(adapters, model_shape("tiny"), 16, 8)
    each = way["server_bytes_per_device"]
    assert each == cost.trained * 4 + cost.state_bytes
    assert (
        12 * cost.trained < each < 12.1 * cost.trained + 1000
    )  # weights and two moments, and counts of steps
    assert main(["plan", *TINY, *personal]) == 0
    assert "server: 40 devices with " in capsys.readouterr().out
    assert planned(capsys)["ways"][0]["server_bytes_per_device"] is None


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_server_of_adapters_holds_what_is_planned(tmp_path, optimiser):
    build("llama").save_pretrained(tmp_path)
    config = parse_config(
        {
            "model": {"name": str(tmp_path), "cut": 1}, "method": "hosl-gradient",
            "server": {"trainable": "lora", "learning_rate": 1e-3, "optimiser": {"name": optimiser}},
        },
        where="test",
    )  # fmt: skip
    server = make_server(config, split_model(build("llama"), 1)[1], [])
    for p in server.trained.values():
        p.grad = torch.zeros_like(p)
    server.optimiser.step()
    assert server_cost(config, model_shape(str(tmp_path)), 4, 8).static_bytes == party_bytes(server)


def test_a_cut_that_was_not_compared_is_not_said_not_to_fit(capsys):
    assert main(["plan", "tiny", "--cuts", "1", "--tokens", "8", "--ways", "hosl"]) == 0
    assert "does not fit" not in capsys.readouterr().out
