"""Rounds against a slow reference that stores what it draws, against torch's own SGD, and against each other."""

import numpy as np
import pytest
import torch

from hosl.core.directions import direction, direction_seed
from hosl.core.journal import Journal
from hosl.core.rounds import (
    StepInputs,
    fo_round,
    fo_zo_round,
    frozen_round,
    hosl_first_plus_round,
    hosl_gradient_round,
    hosl_round,
    zo_round,
)
from hosl.errors import NonFiniteError
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.loss import row_losses
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.servers.basic import FirstOrderServer, ZerothOrderServer
from hosl.split import split_model

ETA_C, ETA_S, EPSILON, Q = 3e-3, 5e-2, 1e-3, 3


def _constant(rate):
    return lambda step: rate


def _weights(*halves):
    return {name: p.detach().clone() for half in halves for name, p in half.named_parameters()}


def _monolith_loss(model, batch):
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets.labels))


def _reference_hosl(model, client_names, batch, steps, server_gradient=None):
    """Algorithm 1 as the paper prints it: in place, +eps, -2 eps, +eps, directions stored; the whole model at once.

    `server_gradient`(model, batch, stored directions) leaves the server's gradient in the parameters; None: the clean.
    """
    parameters = dict(model.named_parameters())
    for step in range(1, steps + 1):
        seeds = [direction_seed(0, step, q) for q in range(Q)]
        stored, coefficients = [], []
        for seed in seeds:
            z = {
                n: torch.from_numpy(direction(seed, n, tuple(parameters[n].shape), "gaussian"))
                for n in client_names
            }
            stored.append(z)
            losses = []
            for sign in (+1, -1):
                theta = {n: parameters[n].detach() + sign * EPSILON * z[n].double() for n in client_names}
                with torch.no_grad():
                    losses.append(float(torch.func.functional_call(_Loss(model), _prefixed(theta), (batch,))))
            coefficients.append((losses[0] - losses[1]) / (2 * EPSILON))
        model.zero_grad()
        (server_gradient or _clean_gradient)(model, batch, stored)
        with torch.no_grad():
            for name, p in parameters.items():
                if name not in client_names and p.grad is not None:
                    p -= ETA_S * p.grad
            for z, c in zip(stored, coefficients, strict=True):
                scale = float(np.float32(ETA_C / Q * c))  # the journal's rounding, part of the definition
                for name in client_names:
                    parameters[name] -= scale * z[name].double()


def _clean_gradient(model, batch, stored):
    _monolith_loss(model, batch).backward()


def _gradient_at_plus(model, batch, stored):
    """Mean over these directions of the gradient with the client at theta + epsilon z."""
    for z in stored:
        shifted = {n: model.get_parameter(n).detach() + EPSILON * u.double() for n, u in z.items()}
        (torch.func.functional_call(_Loss(model), _prefixed(shifted), (batch,)) / len(stored)).backward()


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return _monolith_loss(self.model, batch)


def _prefixed(theta):
    return {f"model.{name}": value for name, value in theta.items()}


def test_hosl_equals_a_reference_that_stores_its_directions(tiny, class_batch):
    """float64 throughout, 20 steps, Q = 3."""
    client_half, server_half = split_model(tiny("bert", torch.float64), 2)
    reference = tiny("bert", torch.float64)
    client = ZerothOrderClient(client_half)
    server = FirstOrderServer(server_half, learning_rate=_constant(ETA_S))
    for step in range(1, 21):
        seeds = [direction_seed(0, step, q) for q in range(Q)]
        hosl_round(
            client, server, class_batch, StepInputs(step, seeds=seeds, epsilon=EPSILON, learning_rate=ETA_C)
        )
    _reference_hosl(reference, {n for n, _ in client_half.named_parameters()}, class_batch, 20)
    for name, value in _weights(client_half, server_half).items():
        torch.testing.assert_close(value, reference.get_parameter(name).detach(), rtol=1e-9, atol=1e-12)


def test_the_servers_gradient_is_taken_at_the_first_plus_probe(tiny, class_batch):
    """Against the same reference, float64; and the loss reported is that of this probe."""
    client_half, server_half = split_model(tiny("bert", torch.float64), 2)
    reference = tiny("bert", torch.float64)
    client = ZerothOrderClient(client_half)
    server = FirstOrderServer(server_half, learning_rate=_constant(ETA_S))
    uploads, losses_of = [], server.losses
    server.losses = lambda activations, targets: (
        uploads.append(len(activations)) or losses_of(activations, targets)
    )
    for step in range(1, 6):
        seeds = [direction_seed(0, step, q) for q in range(Q)]
        pluses = [h_plus for h_plus, _ in client.probes(class_batch, seeds[:1], EPSILON)]
        expected = np.mean(losses_of(pluses, class_batch.targets))
        result = hosl_first_plus_round(
            client, server, class_batch, StepInputs(step, seeds=seeds, epsilon=EPSILON, learning_rate=ETA_C)
        )
        assert result.loss == pytest.approx(expected, rel=1e-12)
    assert sum(uploads) == 5 * (2 * Q - 1)  # the other is the server's step's
    names = {n for n, _ in client_half.named_parameters()}
    _reference_hosl(
        reference, names, class_batch, 5, lambda m, b, stored: _gradient_at_plus(m, b, stored[:1])
    )
    for name, value in _weights(client_half, server_half).items():
        torch.testing.assert_close(value, reference.get_parameter(name).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_fo_fo_equals_ordinary_training_of_the_whole(tiny, class_batch, optimiser):
    client_half, server_half = split_model(tiny("bert", torch.float64), 1)
    spec = OptimiserSpec(name=optimiser)
    client = FirstOrderClient(client_half, optimiser=spec)
    server = FirstOrderServer(server_half, learning_rate=_constant(0.01), optimiser=spec)
    whole = tiny("bert", torch.float64)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimiser]
    trainer = kind(whole.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(1, 6):
        fo_round(client, server, class_batch, StepInputs(step, learning_rate=0.01))
        trainer.zero_grad()
        _monolith_loss(whole, class_batch).backward()
        trainer.step()
    for name, value in _weights(client_half, server_half).items():
        torch.testing.assert_close(value, whole.get_parameter(name).detach(), rtol=1e-6, atol=1e-9)


def test_projected_scalars_equal_those_of_the_loss_up_to_epsilon_squared(tiny, class_batch):
    """Same seeds, a server that does not move, float64: ten times the epsilon, a hundred times the difference."""
    differences = []
    for epsilon in (1e-3, 1e-2):
        results = []
        for method in (hosl_round, hosl_gradient_round):
            client_half, server_half = split_model(tiny("bert", torch.float64), 2)
            client = ZerothOrderClient(client_half)
            server = FirstOrderServer(server_half, learning_rate=_constant(0.0))
            results.append(
                method(
                    client,
                    server,
                    class_batch,
                    StepInputs(1, seeds=[1, 2, 3], epsilon=epsilon, learning_rate=0.0),
                )
            )
        assert results[0].loss == results[1].loss
        first, second = (np.array(result.coefficients) for result in results)
        differences.append(np.abs(first - second).max())
        assert np.abs(first).max() > 10 * differences[-1]
    assert differences[1] / differences[0] == pytest.approx(100, rel=0.1)


def test_the_server_is_the_same_for_all_probes_and_steps_once(tiny, class_batch):
    """I1, I2, I3: recorded at the server's door."""
    client_half, server_half = split_model(tiny("bert"), 2)
    client = ZerothOrderClient(client_half)
    server = FirstOrderServer(server_half, learning_rate=_constant(ETA_S))
    clean, seen = client.forward(class_batch), []

    def total():
        return float(sum(p.detach().double().sum() for p in server_half.parameters()))

    class Watching:
        scores, gradient = server.scores, server.gradient

        def losses(self, activations, targets):
            seen.append(("losses", total()))
            return server.losses(activations, targets)

        def step(self, activations, targets, *, step, want_gradient=False):
            assert torch.equal(activations, clean)
            seen.append(("step", total()))
            return server.step(activations, targets, step=step, want_gradient=want_gradient)

    hosl_round(
        client, Watching(), class_batch, StepInputs(1, seeds=[1, 2], epsilon=EPSILON, learning_rate=ETA_C)
    )
    assert [call for call, _ in seen] == ["losses", "losses", "step"]
    assert len({weights for _, weights in seen}) == 1
    assert total() != seen[0][1]


def test_a_repeated_step_answers_again_and_changes_nothing(tiny, class_batch):
    client_half, server_half = split_model(tiny("bert"), 2)
    client = FrozenClient(client_half)
    server = FirstOrderServer(server_half, learning_rate=_constant(ETA_S))
    h = client.forward(class_batch)
    first = server.step(h, class_batch.targets, step=1, want_gradient=True)
    after = _weights(server_half)
    again = server.step(h, class_batch.targets, step=1, want_gradient=True)
    assert again is first
    assert all(torch.equal(after[name], p) for name, p in server_half.named_parameters())


def test_the_two_halves_of_zo_zo_draw_independent_directions(tiny):
    """I7, against D5: no stream of one half recurs in the other, and their correlation is that of chance."""
    client_half, server_half = split_model(tiny("opt"), 1)
    client_seed, server_seed = direction_seed(0, 1, 0), direction_seed(0, 1, 0, "server")
    assert client_seed != server_seed
    u_c, u_s = (
        np.concatenate(
            [direction(seed, n, tuple(p.shape), "gaussian").ravel() for n, p in half.named_parameters()]
        )
        for seed, half in ((client_seed, client_half), (server_seed, server_half))
    )
    n = min(u_c.size, u_s.size)
    assert abs(np.corrcoef(u_c[:n], u_s[:n])[0, 1]) < 4 / np.sqrt(n)
    long_runs = {u_c[i : i + 4].tobytes() for i in range(0, n - 4, 4)}
    recurring = sum(u_s[i : i + 4].tobytes() in long_runs for i in range(0, n - 4, 4))
    assert recurring == 0


@pytest.mark.usefixtures("unchecked")
def test_zo_zo_lowers_the_loss_of_both_halves(tiny, class_batch):
    client_half, server_half = split_model(tiny("bert"), 2)
    client = ZerothOrderClient(client_half)
    server = ZerothOrderServer(server_half, learning_rate=_constant(1e-3))
    before, start = _weights(client_half, server_half), None
    for step in range(1, 41):
        seeds = [direction_seed(0, step, q) for q in range(4)]
        others = [direction_seed(0, step, q, "server") for q in range(4)]
        result = zo_round(
            client,
            server,
            class_batch,
            StepInputs(step, seeds=seeds, server_seeds=others, epsilon=1e-3, learning_rate=1e-3),
        )
        start = start or result.loss
    assert result.loss < start
    assert all(
        not torch.equal(before[n], p)
        for half in (client_half, server_half)
        for n, p in half.named_parameters()
    )


def test_fo_zo_moves_the_client_by_backprop_and_the_server_by_probes(tiny, option_batch):
    client_half, server_half = split_model(tiny("opt"), 2)
    client = FirstOrderClient(client_half)
    server = ZerothOrderServer(server_half, learning_rate=_constant(1e-4))
    losses = [
        fo_zo_round(
            client,
            server,
            option_batch,
            StepInputs(step, server_seeds=[step], epsilon=1e-3, learning_rate=1e-2),
        ).loss
        for step in range(1, 21)
    ]
    assert losses[-1] < losses[0]


def test_a_frozen_client_keeps_every_bit(tiny, class_batch):
    client_half, server_half = split_model(tiny("bert"), 2)
    before = _weights(client_half)
    server = FirstOrderServer(server_half, learning_rate=_constant(ETA_S))
    for step in range(1, 4):
        frozen_round(FrozenClient(client_half), server, class_batch, StepInputs(step))
    assert all(torch.equal(before[name], p) for name, p in client_half.named_parameters())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_journal_rebuilds_the_client_bit_for_bit_after_200_steps(tiny, class_batch, dtype):
    client_half, server_half = split_model(tiny("bert", dtype), 2)
    client = ZerothOrderClient(client_half, distribution="rademacher")
    server = FirstOrderServer(server_half, learning_rate=_constant(1e-3))
    for step in range(1, 201):
        seeds = [direction_seed(9, step, q) for q in range(2)]
        hosl_round(
            client, server, class_batch, StepInputs(step, seeds=seeds, epsilon=1e-2, learning_rate=1e-3)
        )
    data = client.journal.to_bytes()
    assert len(data) <= 16 * 200 * 2

    base, _ = split_model(tiny("bert", dtype), 2)
    late = ZerothOrderClient(base, distribution="rademacher")
    late.replay(Journal.from_bytes(data))
    rebuilt = _weights(base)
    assert all(torch.equal(rebuilt[name], p) for name, p in client_half.named_parameters())
    start = tiny("bert", dtype)
    assert any(not torch.equal(start.get_parameter(name), value) for name, value in rebuilt.items())


def test_option_losses_equal_the_log_likelihoods_of_the_whole_model(tiny, option_batch):
    """Token by token, from the monolith's full logits."""
    model = tiny("opt")
    client_half, server_half = split_model(model, 2)
    server = FirstOrderServer(server_half, learning_rate=_constant(0.0))
    (loss,) = server.losses([FrozenClient(client_half).forward(option_batch)], option_batch.targets)
    ids, mask = torch.from_numpy(option_batch.input_ids), torch.from_numpy(option_batch.targets.mask).long()
    with torch.no_grad():
        log_probabilities = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    rows = []
    for row, (positions, tokens) in enumerate(
        zip(option_batch.targets.positions, option_batch.targets.tokens, strict=True)
    ):
        scored = [log_probabilities[row, p, t] for p, t in zip(positions, tokens, strict=True) if t >= 0]
        rows.append(-torch.stack(scored).mean())
    assert loss == pytest.approx(float(torch.stack(rows).mean()), rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_step_and_leaves_the_server_as_it_was(tiny, class_batch):
    client_half, server_half = split_model(tiny("bert"), 2)
    server = FirstOrderServer(server_half, learning_rate=_constant(ETA_S))
    before = _weights(server_half)
    h = FrozenClient(client_half).forward(class_batch) * float("nan")
    with pytest.raises(NonFiniteError, match="training loss of step 1 is nan"):
        server.step(h, class_batch.targets, step=1)
    assert all(torch.equal(before[name], p) for name, p in server_half.named_parameters())


def test_row_losses_are_per_row(class_batch):
    logits = torch.zeros(3, 5)
    assert torch.allclose(row_losses(logits, class_batch.targets), torch.full((3,), float(np.log(5))))
