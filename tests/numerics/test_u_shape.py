"""Labels at the client: the same training as with labels at the server, by the ordinary split as oracle."""

from copy import deepcopy

import pytest
import torch

from hosl.core.rounds import StepInputs, fo_round, hosl_gradient_round, hosl_round
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.remote import torch_wire
from hosl.parties.remote.local_trunk import LocalTrunk
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.headed import HeadedServer
from hosl.parties.servers.trunk import TrunkServer
from hosl.split import split_model, split_u_shape


def _rounds(method, client, server, batch, steps):
    losses = []
    for step in range(1, steps + 1):
        inputs = StepInputs(step, learning_rate=1e-3, seeds=[step, step + 100], epsilon=1e-3)
        losses.append(method(client, server, batch, inputs).loss)
    return losses


@pytest.mark.parametrize("method", [hosl_round, hosl_gradient_round, fo_round])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bert"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_training_is_that_of_the_ordinary_split(tiny, class_batch, option_batch, family, method, optimiser):
    """In float64, where the order of a sum matters little; these heads are untied, so both train the same weights."""
    model = tiny(family, torch.float64)
    batch = class_batch if family == "bert" else option_batch
    spec, eta = OptimiserSpec(name=optimiser), lambda step: 1e-2
    kind = FirstOrderClient if method is fo_round else ZerothOrderClient
    client_half, server_half = split_model(deepcopy(model), 1)
    server = FirstOrderServer(server_half, learning_rate=eta, optimiser=spec)
    expected = _rounds(method, kind(client_half), server, batch, 5)
    client_half, trunk, head = split_u_shape(deepcopy(model), 1)
    headed = HeadedServer(
        LocalTrunk(TrunkServer(trunk, learning_rate=eta, optimiser=spec), torch_wire),
        head,
        learning_rate=eta,
        optimiser=spec,
    )
    assert _rounds(method, kind(client_half), headed, batch, 5) == pytest.approx(expected, rel=1e-9)
    trained = dict(trunk.named_parameters()) | dict(head.named_parameters())
    for name, p in server_half.named_parameters():
        torch.testing.assert_close(trained[name], p, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [FirstOrderClient, RecomputingClient])
def test_a_tied_head_follows_the_embedding_and_is_not_trained(tiny, option_batch, kind):
    client_half, trunk, head = split_u_shape(tiny("opt"), 1)
    tied = {id(p) for p in client_half.parameters()}
    eta = lambda step: 0.1  # noqa: E731
    server = HeadedServer(
        LocalTrunk(TrunkServer(trunk, learning_rate=eta), torch_wire), head, learning_rate=eta, without=tied
    )
    before = head.model.lm_head.weight.detach().clone()
    _rounds(fo_round, kind(client_half), server, option_batch, 1)
    assert head.model.lm_head.weight is client_half.model.model.decoder.embed_tokens.weight
    assert not torch.equal(head.model.lm_head.weight, before)  # by the client's own training
    assert all(id(p) not in tied for p in server.trained.values())
