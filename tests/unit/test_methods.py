"""The table of methods against what the methods do: each row's claims are read off a step of its own parties."""

import ast
from pathlib import Path

import numpy as np
import pytest

from hosl.config import Config, ModelConfig, ZOConfig, parse_config
from hosl.core.methods import FIRST_ORDER, FROZEN, GOVERNED, METHODS
from hosl.core.targets import Batch, ClassTargets
from hosl.errors import ConfigError
from hosl.methods.step import method_round
from hosl.methods.torch_parties import make_client
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.planner.fakes import CountingServer
from hosl.split import split_model
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import to_enum

DIRECTIONS = 3
SOURCES = Path(__file__).parents[2] / "src"


class Recording(CountingServer):
    """Also what a step asked for besides."""

    asked: tuple[str, ...] = ()

    def __getattribute__(self, name):
        if name in ("losses", "step", "gradient", "probe", "descend"):
            self.asked = (*self.asked, name)
        return super().__getattribute__(name)


@pytest.fixture
def stepped(tiny):
    """`stepped(method)`: the client after a step, what changed in it, and the server that answered."""

    def step(method):
        config = Config(method=method, model=ModelConfig(cut=2), zo=ZOConfig(directions=DIRECTIONS))
        client = make_client(config.with_client_rate(0.1), split_model(tiny("bert"), 2)[0])
        ids = np.arange(3, 43).reshape(4, 10)
        batch = Batch(ids, ClassTargets(np.ones(ids.shape, np.int8), np.array([0, 1, 0, 1])))
        before = {name: p.detach().clone() for name, p in client.half.model.named_parameters()}
        server = Recording()
        method_round(config.with_client_rate(0.1), client, server, batch, 1)
        changed = {n for n, p in client.half.model.named_parameters() if not (p == before[n]).all()}
        return client, changed, server

    return step


@pytest.mark.parametrize("method", METHODS)
def test_a_step_sends_and_asks_what_the_row_says(stepped, method):
    _, _, server = stepped(method)
    row = METHODS[method]
    assert server.uploads == row.uploads(DIRECTIONS)
    assert server.questions - server.asked.count("descend") == row.requests(DIRECTIONS)
    assert bool(server.gradients) == row.wants_gradient
    assert ("descend" in server.asked) == (row.server == "zeroth-order")


@pytest.mark.parametrize("method", METHODS)
def test_what_a_client_trains_and_keeps_is_what_the_row_says(stepped, method):
    client, changed, _ = stepped(method)
    row = METHODS[method]
    assert bool(changed) == (row.trains != "nothing") == bool(client.trained)
    assert changed <= client.trained.keys()
    journal = client.journal.to_bytes() if isinstance(client, ZerothOrderClient) else b""
    assert bool(journal) == (row.client_state == "journal")
    assert (row.client_state == "none") == (row.trains == "nothing")
    blocks = {name.split(".layer.")[1].split(".")[0] for name in changed if ".layer." in name}
    assert blocks == {"nothing": set(), "chosen": {"0", "1"}, "last-blocks": {"1"}}[row.trains]


@pytest.mark.parametrize("method", METHODS)
def test_a_server_has_a_name_for_every_method(method):
    assert to_enum(pb.Method, METHODS[method].on_the_wire)


def test_every_method_of_the_wire_is_one_of_the_table():
    named = {value.name for value in pb.Method.DESCRIPTOR.values} - {"METHOD_UNSPECIFIED"}
    assert named <= {name.upper().replace("-", "_") for name in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_usual_rates_lie_among_those_that_are_tried(method):
    for optimiser in ("sgd", "adamw"):
        rates = METHODS[method].rates_for(optimiser)
        for trainable in ("all", "blocks", "last-block", "lora"):
            tried = rates.to_try_for(trainable)
            assert list(tried) == sorted(tried)
            assert tried[0] <= rates.usual_for(trainable) <= tried[-1]


OTHER = {
    "zo.server_gradient_at": "first-plus", "zo.sides": "one", "zo.derivative": "forward-mode", "zo.row_clip": 2.0,
    "zo.clip": 2.0, "zo.normalise": "spread", "client.trainable": "lora", "client.dtype": "int8",
    "client.optimiser": {"name": "adamw"}, "client.micro_batch_size": 2, "residual.slopes": "one",
    "residual.decay": 0.5, "residual.kept": "inputs",
}  # fmt: skip


@pytest.mark.parametrize("path", GOVERNED)
@pytest.mark.parametrize("method", METHODS)
def test_a_setting_is_refused_by_the_methods_that_do_not_read_it(method, path):
    section, name = path.split(".")
    settings = {"method": method, section: {name: OTHER[path]}}
    if path == "client.dtype":
        settings["client"]["trainable"] = "lora"
    row = METHODS[method]
    if {path, f"{section}.trainable" if path == "client.dtype" else path} <= row.reads | row.lets_stand:
        parse_config(settings, where="x")
        return
    with pytest.raises(ConfigError, match=f"is not read by method {method}, got .*; methods that read it: "):
        parse_config(settings, where="x")


def test_the_two_ends_of_every_comparison_are_rows():
    assert METHODS[FROZEN].trains == "nothing"
    assert METHODS[FIRST_ORDER].backward == "graph"
    assert METHODS[FIRST_ORDER].server == "first-order"
    assert next(iter(METHODS)) == FROZEN
    assert list(METHODS)[-1] == FIRST_ORDER


def test_names_of_methods_are_listed_in_the_table_alone():
    """A list of method names is a question that the table should answer."""
    lists = []
    for path in SOURCES.rglob("*.py"):
        if path.name == "methods.py" and path.parent.name == "core":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.MatchOr):
                parts = node.patterns if isinstance(node, ast.MatchOr) else node.elts
                values = [part.value for part in parts if isinstance(part, ast.Constant | ast.MatchValue)]
                names = [value.value if isinstance(value, ast.Constant) else value for value in values]
                if sum(isinstance(name, str) and name in METHODS for name in names) > 1:
                    lists.append(f"{path.relative_to(SOURCES)}:{node.lineno}")
    assert lists == []
