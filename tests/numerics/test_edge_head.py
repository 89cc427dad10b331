"""The head of a client that keeps its labels, on the inference engine, against its torch twin."""

import re
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch

from hosl.core.targets import StepReply, positions_of, states_shape, weight_of
from hosl.errors import NonFiniteError
from hosl.parties.edge.half import EdgeHalf
from hosl.parties.edge.head import EdgeHalfHead, EdgeHeadedServer
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.servers.headed import HeadedServer
from hosl.split import load_half, load_head
from hosl.split.artifact import split_folder
from hosl.split.specs import GraphSpec
from tests.conftest import build

ADAMW = OptimiserSpec(name="adamw")


class FixedStates:
    """A trunk whose states do not depend on what it is asked, in torch's tensors or in arrays."""

    def __init__(self, width, convert):
        self._width, self._convert, self.gradient = width, convert, None

    def states(self, activations, asked, *, at_rest=False):
        shape = states_shape(asked, self._width)
        states = np.random.default_rng(weight_of(asked)).standard_normal(shape).astype(np.float32)
        return [self._convert(states) for _ in activations]

    def step_states(self, activations, asked, answer, *, step, want_gradient):
        (states,) = self.states([activations], asked)
        self.gradient = answer(states)
        return StepReply(0.0, None)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """`split(family)`: the client's folder of a tiny model without blocks, labels at the client, with graphs.

    `split.said`: the lines of progress by family.
    """
    made, said = {}, {}

    def folder(family):
        if family not in made:
            out = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(out / "model")
            classes = {"head": "classification", "num_labels": 5} if family == "bert" else {}
            jaxtyping.config.update("jaxtyping_disable", True)  # sizes are symbols while a graph is traced
            lines = said.setdefault(family, [])
            split_folder(
                out / "model",
                0,
                out / "halves",
                labels="client",
                graphs=GraphSpec(),
                say=lines.append,
                **classes,
            )
            jaxtyping.config.update("jaxtyping_disable", False)
            made[family] = out / "halves/client"
        return made[family]

    folder.said = said
    return folder


def test_each_graph_is_told_before_it_is_made_and_how_long_the_rest_takes(split):
    split("bert")
    first, second, third = split.said["bert"]
    assert first == "graph 1 of 3: prelude.onnx"
    assert re.fullmatch(r"graph 2 of 3: head\.onnx, about \d+ s left", second)
    assert re.fullmatch(r"graph 3 of 3: head-gradient\.onnx, about \d+ s left", third)


def _pair(folder):
    """The torch head and the one on the engine, each over a trunk of the same states."""
    half = load_half(folder)
    head = load_head(folder, half)
    tied = {id(p) for p in half.parameters()}
    edge_half = EdgeHalf(folder)
    width = edge_half.facts.width
    torchs = HeadedServer(
        FixedStates(width, torch.from_numpy),
        head,
        learning_rate=lambda step: 1e-2,
        optimiser=ADAMW,
        without=tied,
    )
    mine = EdgeHeadedServer(
        FixedStates(width, np.asarray), EdgeHalfHead(edge_half), list(torchs.trained),
        learning_rate=lambda step: 1e-2, optimiser=ADAMW,
    )  # fmt: skip
    return torchs, mine


@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_losses_scores_and_training_are_those_of_torch(
    split, family, mean_over, class_batch, option_batch, monkeypatch
):
    if family == "bert" and mean_over == "tokens":
        pytest.skip("classes have one mean")
    monkeypatch.setattr("hosl.parties.edge.head.TOKENS_AT_ONCE", 3)  # more pieces than one
    targets = (class_batch if family == "bert" else option_batch).targets
    targets = targets if family == "bert" else replace(targets, mean_over=mean_over)
    torchs, mine = _pair(split(family))
    h = np.zeros((1, 1, 1), np.float32)
    for step in range(1, 4):
        (loss,) = torchs.losses([torch.from_numpy(h)], targets)
        assert mine.losses([h], targets) == pytest.approx([loss], rel=2e-6)
        scores = torchs.scores(torch.from_numpy(h), targets)
        np.testing.assert_allclose(mine.scores(h, targets), scores, rtol=5e-6, atol=5e-6)
        of_torch = torchs.step(torch.from_numpy(h), targets, step=step)
        assert mine.step(h, targets, step=step).loss == pytest.approx(of_torch.loss, rel=2e-6)
        expected = torchs.trunk.gradient.numpy()
        np.testing.assert_allclose(mine.trunk.gradient, expected, atol=1e-5 * np.abs(expected).max())
    assert mine.trained.keys() == torchs.trained.keys()
    for name, p in torchs.trained.items():
        expected = p.detach().numpy()
        np.testing.assert_allclose(mine.trained[name], expected, atol=1e-5 * np.abs(expected).max())


def test_infinite_states_change_nothing(split, option_batch):
    _, mine = _pair(split("llama"))
    before = {name: weight.copy() for name, weight in mine.trained.items()}
    states = mine.trunk.states([None], positions_of(option_batch.targets))[0]
    states[:] = np.inf
    mine.trunk.states = lambda activations, asked, at_rest=False: [states]
    with pytest.raises(NonFiniteError, match="step 1"):
        mine.step(np.zeros((1, 1, 1), np.float32), option_batch.targets, step=1)
    for name, weight in mine.trained.items():
        np.testing.assert_array_equal(weight, before[name])
    assert np.isnan(mine.losses([np.full((1, 1, 1), np.nan, np.float32)], option_batch.targets)).all()
