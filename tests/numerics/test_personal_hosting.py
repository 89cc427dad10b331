"""A client's half in a bank, as the service has it: every call, checkpoint and way back equals a server of its own."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from hosl.config import parse_config
from hosl.core.targets import ClassTargets, positions_of
from hosl.methods.torch_parties import make_server
from hosl.network.personal_hosting import PersonalBank
from hosl.network.torch_hosting import TorchHosted
from hosl.parties.remote.torch_wire import to_wire
from hosl.split import split_model, split_u_shape

CONFIG = {
    "method": "fo-fo",
    "clients": {"count": 2, "server": "personal"},
    "server": {"trainable": "lora", "learning_rate": 1e-2, "lora": {"r": 4, "alpha": 8}},
}


def batch(client, step):
    drawn = np.random.default_rng([len(client), step])
    h = torch.from_numpy(drawn.normal(size=(2, 7, 32)).astype(np.float32))
    return to_wire(h), ClassTargets(np.ones((2, 7), np.int8), drawn.integers(0, 5, 2))


def stepped(hosted, client, step, labels):
    """A training step; the reply's gradient."""
    h, targets = batch(client, step)
    if labels == "server":
        return hosted.step(h, targets, step, True).gradient.data
    states, finish = hosted.states_for_step(h, positions_of(targets))
    return lambda: finish(states, step, True).gradient.data


def asked(hosted, labels):
    """What changes nothing: losses and scores, or states."""
    h, targets = batch("asked", 1)
    if labels == "client":
        return [state.data for state in hosted.states([h], positions_of(targets))]
    return [*hosted.losses([h, h], targets), hosted.scores(h, targets)]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_client_s_half_in_a_bank_equals_a_server_of_its_own(tiny, tmp_path, labels):
    config = parse_config(CONFIG | {"wire": {"labels": labels}}, where="test")
    whole = tiny("bert")
    half = split_model(whole, 1)[1] if labels == "server" else split_u_shape(whole, 1)[1]
    alone = TorchHosted(config, lambda: make_server(config, deepcopy(half), ()))
    bank = PersonalBank(config, deepcopy(half), (), slots=1)
    ann, bob = bank.of("ann"), bank.of("bob")
    for step in range(1, 5):
        gradients = [stepped(hosted, "ann", step, labels) for hosted in (alone, ann)]
        of_bob = stepped(bob, "bob", step, labels)  # takes the slot, between the two parts of ann's step
        if labels == "client":
            gradients = [update() for update in gradients]
            of_bob()
        assert np.array_equal(*gradients)
        if step == 3:
            for name, hosted in (("alone", alone), ("ann", ann)):
                hosted.save(tmp_path / name, 3, {}, None, ())
    for before, now in zip(asked(alone, labels), asked(ann, labels), strict=True):
        assert np.array_equal(before, now)
    ends = [np.copy(value) for value in asked(ann, labels)]
    for name, hosted in (("alone", alone), ("ann", ann)):
        hosted.restore(tmp_path / name, 3)
    assert not all(np.array_equal(a, b) for a, b in zip(asked(ann, labels), ends, strict=True))
    gradients = [stepped(hosted, "ann", 4, labels) for hosted in (alone, ann)]  # its moments are back, too
    if labels == "client":
        gradients = [update() for update in gradients]
    assert np.array_equal(*gradients)
    for before, now, end in zip(asked(alone, labels), asked(ann, labels), ends, strict=True):
        assert np.array_equal(before, now)
        assert np.array_equal(now, end)
    bob.restore(tmp_path / "none", 0)  # back to what everyone begins with: of bob alone
    assert all(np.array_equal(a, b) for a, b in zip(asked(ann, labels), ends, strict=True))
