"""Several clients that keep their labels train one trunk: a round is one batch of all, however their calls fall."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from hosl.core.targets import (
    Batch,
    OptionTargets,
    RowPositionTargets,
    positions_of,
    scored_positions,
    scored_tokens,
    states_shape,
    weight_of,
)
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.remote import torch_wire
from hosl.parties.remote.local_trunk import LocalTrunk
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.headed import HeadedServer
from hosl.parties.servers.trunk import SynchronousTrunkServer, TrunkServer
from hosl.split import joined_server_half, split_model, split_u_shape
from hosl.tasks import Example
from hosl.tasks.collate import token_batch

ETA = {"learning_rate": lambda step: 0.05, "optimiser": OptimiserSpec(name="sgd", momentum=0.9)}


def text_batch(rows, seq=12, mean_over="tokens", seed=0):
    """Left-padded rows of several lengths, each with an answer of its own length at its end."""
    draw = np.random.default_rng(seed)
    ids, mask = draw.integers(3, 97, (rows, seq)), np.ones((rows, seq), np.int8)
    positions, tokens = np.zeros((rows, 5), np.int32), np.full((rows, 5), -1, np.int32)
    for row in range(rows):
        mask[row, : draw.integers(0, 4)] = 0
        length = int(draw.integers(1, 6))
        positions[row, :length] = np.arange(seq - length, seq) - 1
        tokens[row, :length] = ids[row, seq - length :]
    return Batch(ids, OptionTargets(mask, positions, tokens, mean_over))


def part_of(batch, rows):
    """Some rows of a batch."""
    targets = replace(
        batch.targets,
        **{n: getattr(batch.targets, n)[rows] for n in ("mask", "positions", "tokens")},
    )
    return Batch(batch.input_ids[rows], targets)


class RoundTrunk(LocalTrunk):
    """A device's way to a trunk that several train in rounds; its parts wait for `apply`."""

    def step_states(self, activations, targets, answer, *, step, want_gradient):
        states, contribute = self._server.states_for_part(activations, targets)
        return contribute(answer(states), weight_of(targets), want_gradient)


def _pieces(tiny, family="gpt_neox"):
    model = tiny(family, torch.float64)
    client, trunk, head = split_u_shape(deepcopy(model), 1)
    for p in head.parameters():
        p.requires_grad_(False)  # one head for all: a device's own would differ after its first step
    return FrozenClient(client), trunk, head


@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
@pytest.mark.parametrize("family", ["gpt_neox", "opt"])  # norms in float64; others compute theirs in float32
def test_a_round_of_two_clients_is_one_batch_of_both(tiny, family, mean_over):
    batch = text_batch(5, mean_over=mean_over)
    parts = [part_of(batch, slice(0, 2)), part_of(batch, slice(2, 5))]
    assert weight_of(parts[0].targets) != weight_of(parts[1].targets)
    client, trunk, head = _pieces(tiny, family)
    one = HeadedServer(LocalTrunk(TrunkServer(trunk, **ETA), torch_wire), head, **ETA)
    others, other_trunk, other_head = _pieces(tiny, family)
    rounds = SynchronousTrunkServer(other_trunk, **ETA)
    devices = [HeadedServer(RoundTrunk(rounds, torch_wire), other_head, **ETA) for _ in parts]
    for step in (1, 2, 3):
        whole = one.step(client.forward(batch), batch.targets, step=step, want_gradient=True)
        replies = [
            device.step(others.forward(part), part.targets, step=step, want_gradient=True)
            for device, part in zip(devices, parts, strict=True)
        ]
        rounds.apply(step)
        weights = np.array([weight_of(part.targets) for part in parts]) / weight_of(batch.targets)
        assert float(weights @ [reply.loss for reply in replies]) == pytest.approx(whole.loss, rel=1e-9)
        together = torch.cat([w * reply.gradient for w, reply in zip(weights.tolist(), replies, strict=True)])
        torch.testing.assert_close(together, whole.gradient, rtol=1e-9, atol=1e-12)
        for name, p in trunk.named_parameters():
            torch.testing.assert_close(dict(other_trunk.named_parameters())[name], p, rtol=1e-9, atol=1e-12)


def test_a_graph_that_another_batch_displaced_gives_the_same_bits(tiny):
    """Only the newest graph is kept: the memory does not grow with the clients."""
    gradients = []
    for interleaved in (False, True):
        client, trunk, _ = _pieces(tiny)
        server = SynchronousTrunkServer(trunk, **ETA)
        batches = [text_batch(2, seed=seed) for seed in (1, 2)]
        begun, found = [], []

        def end(part, found=found, begun=begun, batches=batches):
            states, contribute = begun[part]
            found.append(contribute(torch.cos(states), weight_of(batches[part].targets), True).gradient)

        for part, batch in enumerate(batches):
            begun.append(server.states_for_part(client.forward(batch), positions_of(batch.targets)))
            if not interleaved:
                end(part)
        for part in range(2) if interleaved else ():
            end(part)
        server.apply(1)
        gradients.append([*found, *(p.detach().clone() for p in trunk.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_gradient_that_comes_after_its_round_counts_at_the_blocks_as_they_are(tiny):
    batch = text_batch(3)
    client, trunk, _ = _pieces(tiny)
    server, asked = SynchronousTrunkServer(trunk, **ETA), positions_of(batch.targets)
    states, contribute = server.states_for_part(client.forward(batch), asked)
    _, other = server.states_for_part(client.forward(batch), asked)
    other(torch.ones_like(states), weight_of(asked), False)
    server.apply(1)
    late = contribute(torch.cos(states), weight_of(asked), True).gradient
    again, now = server.states_for_part(client.forward(batch), asked)
    assert not torch.equal(again, states)
    assert torch.equal(now(torch.cos(states), weight_of(asked), True).gradient, late)


def test_texts_are_asked_for_by_row_and_scored_as_the_whole_server_scores_them(tiny):
    """To the rounding of float64: the sums of both ways run over other shapes."""
    batch = text_batch(6)
    asked = positions_of(batch.targets)
    assert isinstance(asked, RowPositionTargets)
    assert states_shape(asked, 32) == (1, int((batch.targets.tokens >= 0).sum()), 32)
    model = tiny("gpt_neox", torch.float64)
    client_half, server_half = split_model(deepcopy(model), 1)
    client, whole = FrozenClient(client_half), FirstOrderServer(server_half, **ETA)
    _, trunk, head = split_u_shape(deepcopy(model), 1)
    headed = HeadedServer(LocalTrunk(TrunkServer(trunk, **ETA), torch_wire), head, **ETA)
    h = client.forward(batch)
    np.testing.assert_allclose(
        headed.scores(h, batch.targets), whole.scores(h, batch.targets), rtol=1e-9, atol=1e-12
    )
    (loss,) = headed.losses([h], batch.targets)
    assert loss == pytest.approx(whole.losses([h], batch.targets)[0], rel=1e-9)
    assert headed.step(h, batch.targets, step=1).loss == pytest.approx(
        whole.step(h, batch.targets, step=1).loss, rel=1e-9
    )
    for name, p in joined_server_half(trunk, head).named_parameters():
        torch.testing.assert_close(p, dict(server_half.named_parameters())[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
@pytest.mark.parametrize("cut", [0, 2, 3])
def test_a_trunk_and_a_head_are_the_ordinary_server_half_again(tiny, padded, family, cut):
    model = tiny(family)
    ids, mask = padded("left" if family != "bert" else "right")
    client, server = split_model(deepcopy(model), cut)
    _, trunk, head = split_u_shape(model, cut)
    joined = joined_server_half(trunk, head)
    with torch.no_grad():
        h = client(ids, mask)
        assert torch.equal(joined(h, mask), server(h, mask))
    assert joined.state_dict().keys() == server.state_dict().keys()
    assert joined.config.to_dict() == server.config.to_dict()
    next(iter(trunk.parameters()), head.model.get_parameter(next(iter(head.state_dict())))).data.add_(1)
    with torch.no_grad():
        assert not torch.equal(joined(h, mask), server(h, mask))  # what is trained is what is joined


def test_a_server_that_knows_the_head_computes_the_tokens_from_the_gradient(tiny):
    """What docs/concepts/privacy.md warns of: no token crosses, and yet each is found."""
    batch = text_batch(6)
    client, trunk, head = _pieces(tiny)
    sent = []

    class Watched(LocalTrunk):
        def step_states(self, activations, targets, answer, **how):
            def seen(states):
                sent.append((states, answer(states)))
                return sent[-1][1]

            return super().step_states(activations, targets, seen, **how)

    HeadedServer(Watched(TrunkServer(trunk, **ETA), torch_wire), head, **ETA).step(
        client.forward(batch), batch.targets, step=1
    )
    ((states, gradient),) = sent
    right = scored_tokens(batch.targets)
    guessed = []
    for state, found in zip(states[0], gradient[0], strict=True):
        every = state.repeat(97, 1, 1).requires_grad_()
        loss = torch.nn.functional.cross_entropy(head.logits(every)[:, 0], torch.arange(97), reduction="sum")
        (candidates,) = torch.autograd.grad(loss, every)
        guessed.append(int((candidates[:, 0] / states.shape[1] - found).norm(dim=1).argmin()))
    assert guessed == right[right >= 0].tolist()


@pytest.mark.parametrize(("turns", "share"), [((1, 2), 0.61), ((2, 5), 0.3)])
def test_states_of_texts_are_those_of_each_rows_own_positions(turns, share):
    """Of 16 texts with answers of 5 to 39 tokens: one answer each, then chats of two to four turns."""
    draw, examples = np.random.default_rng(0), []
    for _ in range(16):
        length, spans = 1, []
        for _ in range(draw.integers(*turns)):
            start = length + int(draw.integers(10, 60))
            length = start + int(draw.integers(5, 40))
            spans.append((start, length))
        examples.append(Example(rows=(tuple(range(3, 3 + length)),), scored=tuple(spans)))
    targets = token_batch(examples, 0).targets
    alone = np.prod(states_shape(positions_of(targets), 576))
    for_all = len(examples) * len(scored_positions(targets)) * 576
    assert alone / for_all < share
