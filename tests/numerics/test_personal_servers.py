"""Servers of several clients over one base: each equals one of its own, peft's layers under torch's optimiser."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hosl.core.targets import ClassTargets, OptionTargets, positions_of
from hosl.errors import NonFiniteError
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.personal import AskedStep, PersonalServers
from hosl.parties.servers.trunk import TrunkServer
from hosl.split import LoraSpec, add_lora, split_model, split_u_shape

CLIENTS = ("ann", "bob", "cem", "dee", "eve", "fay")
LENGTHS = (7, 8, 7, 8, 8, 12)  # of each client's rows: one eighth is filled, the last has a pass of its own
# each client's rows in each of five steps; 0: it is absent
ROWS = [[2, 2, 2, 2, 2, 2], [1, 3, 2, 0, 4, 1], [2, 0, 2, 2, 0, 2], [0, 0, 5, 1, 1, 0], [1, 2, 1, 1, 3, 0]]


def adapted_half(tiny, family, dtype=torch.float32):
    """A server half with adapters that differ from zero, and its head trained where it classifies."""
    _, half = split_model(tiny(family, dtype), 1)
    add_lora(half, LoraSpec(r=4, alpha=8), seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, p in half.named_parameters():
        if name.startswith("classifier."):
            p.requires_grad_(True)
        if ".lora_B." in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return half


def trunk_party(half):
    return TrunkServer(half, learning_rate=lambda step: 1e-3, optimiser=ADAMW)


def make_party(spec, rate=1e-3):
    return lambda half: FirstOrderServer(half, learning_rate=lambda step: rate, optimiser=spec)


def question(client, rows, step, classes, *, dtype=torch.float32, want_gradient=True):
    """One step of a client: its activations and its targets, of positions that differ between clients."""
    place = CLIENTS.index(client)
    seed, seq = place * 100 + step, LENGTHS[place]
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, seq, 32, generator=generator).to(dtype)
    mask = np.ones((rows, seq), np.int8)
    mask[0, -2:] = 0
    drawn = np.random.default_rng(seed)
    if classes:
        targets = ClassTargets(mask, drawn.integers(0, 5, rows))
    else:
        first = int(drawn.integers(0, 3))
        positions = np.tile(np.array([first, first + 1], np.int32), (rows, 1))
        targets = OptionTargets(mask, positions, drawn.integers(0, 97, (rows, 2)).astype(np.int32), "tokens")
    return AskedStep(client, h, targets, step, want_gradient)


class Alone:
    """The oracle: peft's layers in a copy of the half, torch's loss, torch's optimiser. Nothing of a server."""

    def __init__(self, half, spec, rate):
        self.half = deepcopy(half)
        self.trained = {name: p for name, p in self.half.named_parameters() if p.requires_grad}
        if spec.name == "adamw":
            self.optimiser = torch.optim.AdamW(self.trained.values(), rate, weight_decay=spec.weight_decay)
        else:
            self.optimiser = torch.optim.SGD(
                self.trained.values(), rate, spec.momentum, weight_decay=spec.weight_decay
            )

    def loss(self, h, targets):
        logits = self.half(h, torch.from_numpy(targets.mask).long())
        if isinstance(targets, ClassTargets):
            return F.cross_entropy(logits, torch.from_numpy(targets.labels))
        chosen = logits[torch.arange(len(h))[:, None], torch.from_numpy(targets.positions).long()]
        return F.cross_entropy(chosen.flatten(0, 1), torch.from_numpy(targets.tokens).long().flatten())

    def step(self, one):
        h = one.activations.clone().requires_grad_()
        loss = self.loss(h, one.targets)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach()), h.grad


SGD = OptimiserSpec(name="sgd", momentum=0.9, weight_decay=0.1)
ADAMW = OptimiserSpec(name="adamw", weight_decay=0.1)


@pytest.mark.parametrize(
    ("spec", "dtype", "rate", "within"),
    [
        (SGD, torch.float32, 1e-2, 1e-6),
        (ADAMW, torch.float32, 1e-3, 1e-6),
        # AdamW divides a gradient by its own size, and so rounding, too: ten times the rate shows only in float64
        (ADAMW, torch.float64, 1e-2, 1e-10),
    ],
    ids=["sgd", "adamw", "adamw in float64"],
)
@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_six_clients_in_one_pass_equal_six_servers_with_peft(tiny, family, spec, dtype, rate, within):
    half = adapted_half(tiny, family, dtype)
    alone = {client: Alone(half, spec, rate) for client in CLIENTS}
    servers = PersonalServers(half, make_party(spec, rate))
    for client in CLIENTS:
        servers.begin(client)
    done = dict.fromkeys(CLIENTS, 0)
    for of_step in ROWS:
        present = [(client, count) for client, count in zip(CLIENTS, of_step, strict=True) if count]
        asked = []
        for client, count in present:
            done[client] += 1
            asked.append(question(client, count, done[client], family == "bert", dtype=dtype))
        before = {
            c: deepcopy(servers.kept(c).optimiser.state_dict()) for c in CLIENTS if c not in dict(present)
        }
        for one, reply in zip(asked, servers.steps(asked), strict=True):
            loss, gradient = alone[one.client].step(one)
            assert abs(reply.loss - loss) <= within
            torch.testing.assert_close(reply.gradient, gradient, rtol=within, atol=within)
        for client, state in before.items():  # absent: no moment moves, nothing decays
            torch.testing.assert_close(servers.kept(client).optimiser.state_dict(), state, rtol=0, atol=0)
    for client in CLIENTS:
        for name, p in servers.kept(client).trained.items():
            torch.testing.assert_close(p, alone[client].trained[name], rtol=within, atol=within)


def states_of(servers):
    """Every client's weights, and the state of its optimiser, as one list of tensors."""
    tensors = []
    for client in CLIENTS:
        party = servers.kept(client)
        tensors += [p.detach().clone() for p in party.trained.values()]
        for state in party.optimiser.state.values():
            tensors += [torch.as_tensor(value).clone() for value in state.values() if value is not None]
    return tensors


def test_not_a_bit_depends_on_who_waits_in_the_host_s_memory(tiny):
    ends = []
    for of_all in (None, 2):
        servers = PersonalServers(adapted_half(tiny, "llama"), make_party(ADAMW), slots=of_all)
        for client in CLIENTS:
            servers.begin(client)
        for step in range(1, 3):
            for pair in (CLIENTS[:2], CLIENTS[4:], CLIENTS[2:4]):  # two in a pass: the same sums in both
                servers.steps([question(client, 1 + step % 2, step, False) for client in pair])
            servers.of("ann")
        ends.append(states_of(servers))
        assert len(servers.in_slots) == (of_all or 6)
    assert list(servers.in_slots)[-1] == "ann"
    assert "bob" not in servers.in_slots  # used least lately
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_client_whose_rows_are_ruined_is_refused_and_the_others_step(tiny):
    half = adapted_half(tiny, "llama")
    asked = [question(client, 2, 1, False) for client in CLIENTS[:3]]
    asked[1].activations[0, 0, 0] = float("nan")
    servers = PersonalServers(half, make_party(ADAMW))
    for client in CLIENTS:
        servers.begin(client)
    before = {name: p.detach().clone() for name, p in servers.kept("bob").trained.items()}
    replies = servers.steps(asked)
    assert isinstance(replies[1], NonFiniteError)
    assert "step 1" in str(replies[1])
    assert not servers.kept("bob").optimiser.state
    assert all(torch.equal(p, before[name]) for name, p in servers.kept("bob").trained.items())
    for one, reply in ((asked[0], replies[0]), (asked[2], replies[2])):
        alone = Alone(half, ADAMW, 1e-3)
        # the half has the weights of whoever computed last: all began with the same
        with torch.no_grad():
            for name, p in alone.trained.items():
                p.copy_(before[name])
        loss, gradient = alone.step(one)
        assert abs(reply.loss - loss) <= 1e-6
        torch.testing.assert_close(reply.gradient, gradient, rtol=1e-6, atol=1e-6)
        for name, p in servers.kept(one.client).trained.items():
            torch.testing.assert_close(p, alone.trained[name], rtol=1e-6, atol=1e-6)
    again = servers.steps([question("bob", 2, 1, False)])
    assert again[0].loss > 0  # its next step is right


@pytest.mark.parametrize("family", ["llama", "bert", "deberta-v2"])
def test_losses_in_one_pass_are_those_of_each_client_s_server(tiny, family):
    servers = PersonalServers(adapted_half(tiny, family), make_party(SGD))
    asked = []
    for place, client in enumerate(CLIENTS):
        servers.begin(client)
        servers.of(client).step(
            *_parts(question(client, 2, 1, family != "llama")), step=1
        )  # so that they differ
        one = question(client, 1 + place % 3, 2, family != "llama")
        asked.append((client, [one.activations, one.activations * 1.1], one.targets))
    together = servers.losses(asked)
    for (client, hs, targets), found in zip(asked, together, strict=True):
        assert found == pytest.approx(servers.of(client).losses(hs, targets), abs=1e-6)
    assert len({round(loss, 6) for losses in together for loss in losses}) == 12


def _parts(one):
    return one.activations, one.targets


def test_one_client_alone_has_the_bits_of_a_server_of_its_own(tiny):
    half = adapted_half(tiny, "bert")
    single = make_party(ADAMW)(deepcopy(half))
    servers = PersonalServers(half, make_party(ADAMW))
    for client in CLIENTS[:2]:
        servers.begin(client)
    for step in range(1, 4):
        one = question("ann", 3, step, True)
        (reply,) = servers.steps([one])
        due = single.step(*_parts(one), step=step, want_gradient=True)
        assert reply.loss == due.loss
        assert torch.equal(reply.gradient, due.gradient)
        servers.steps([question("bob", 2, step, True)])
    assert all(torch.equal(p, single.trained[name]) for name, p in servers.kept("ann").trained.items())


def test_a_step_in_two_parts_keeps_its_bits_whoever_comes_between(tiny):
    model = tiny("llama")
    ends = []
    for between in (False, True):
        half = split_u_shape(deepcopy(model), 1)[1]
        add_lora(half, LoraSpec(r=4, alpha=8), seed=3)
        servers = PersonalServers(half, trunk_party, slots=1)
        for client in CLIENTS[:2]:
            servers.begin(client)
        for step in range(1, 4):
            one = question("ann", 2, step, False)
            states, update = servers.in_two_parts("ann").states_for_step(
                one.activations, positions_of(one.targets)
            )
            if between:  # takes its slot, and lets its graph go
                other = question("bob", 1, step, False)
                servers.in_two_parts("bob").states_for_step(other.activations, positions_of(other.targets))
            servers.of("ann")
            reply = update(torch.ones_like(states), step, True)
            ends.append(reply.gradient)
        ends += [p.detach().clone() for p in servers.kept("ann").trained.values()]
    half_way = len(ends) // 2
    assert all(torch.equal(a, b) for a, b in zip(ends[:half_way], ends[half_way:], strict=True))
