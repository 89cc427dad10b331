"""An update that would leave NaN or Inf in the weights is refused before it, though the loss is finite."""

import numpy as np
import pytest
import torch

from hosl.core.targets import OptionTargets
from hosl.errors import NonFiniteError
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.servers.basic import FirstOrderServer, ZerothOrderServer
from hosl.parties.servers.synchronous import SynchronousServer
from hosl.split import split_model

MASK = np.ones((2, 4), np.int8)
TARGETS = OptionTargets(MASK, np.array([[2], [2]], np.int32), np.array([[7], [9]], np.int32))


@pytest.fixture
def halves(tiny):
    """Norms by the root mean square: a row of 3e38 becomes 0, and so its loss is finite."""
    return split_model(tiny("llama"), 2)


def _extreme(value=3e38):
    return torch.full((2, 4, 32), value) * torch.linspace(-1, 1, 32)


def _weights(party):
    return {name: p.detach().clone() for name, p in party.trained.items()}


@pytest.mark.parametrize("optimiser", [OptimiserSpec(), OptimiserSpec(name="adamw")])
def test_a_step_at_activations_of_3e38_leaves_the_server_as_it_was(halves, optimiser):
    server = FirstOrderServer(halves[1], learning_rate=lambda step: 1e-2, optimiser=optimiser)
    before = _weights(server)
    assert np.isfinite(server.losses([_extreme()], TARGETS)).all()  # the loss alone does not tell
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        server.step(_extreme(), TARGETS, step=1)
    assert all(torch.equal(before[name], p) for name, p in server.trained.items())
    reply = server.step(_extreme(1.0), TARGETS, step=1)  # and the next one is done
    assert np.isfinite(reply.loss)
    assert all(torch.isfinite(p).all() for p in server.trained.values())


def test_a_contribution_at_activations_of_3e38_does_not_spoil_the_round(halves):
    """The update is that of the honest gradient alone, as one server without the other client makes it."""
    honest, batch = _extreme(1.0), TARGETS
    server = SynchronousServer(halves[1], learning_rate=lambda step: 1e-2)
    start = _weights(server)
    server.contribute(honest, batch, 2)
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        server.contribute(_extreme(), batch, 2)
    server.apply(1)
    after = _weights(server)
    with torch.no_grad():
        for name, p in server.trained.items():
            p.copy_(start[name])
    (server._loss(honest, batch) * 2).backward()
    for name, p in server.trained.items():
        alone = p if p.grad is None else torch.add(start[name], p.grad / 2, alpha=-1e-2)
        assert torch.equal(after[name], alone)


def test_coefficients_of_1e300_leave_a_zeroth_order_server_as_it_was(halves):
    server = ZerothOrderServer(halves[1], learning_rate=lambda step: 1e-2)
    before = _weights(server)
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        server.descend(1, [1, 2], [1e300, 0.0])
    assert all(torch.equal(before[name], p) for name, p in server.trained.items())


def test_a_gradient_of_3e38_leaves_a_first_order_client_as_it_was(halves, option_batch):
    client = FirstOrderClient(halves[0])
    before = _weights(client)
    h = client.forward_for_backward(option_batch)
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        client.backward(torch.full_like(h, 3e38), 1e-2)
    assert all(torch.equal(before[name], p) for name, p in client.trained.items())
