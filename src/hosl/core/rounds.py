"""Every algorithm as one function of two parties, one statement per line of the paper.

Start here. Labels l.N, I-N, D-N are those of docs/concepts/algorithm.md (arXiv 2601.10940, Alg. 1-3). A round never
looks inside an activation and never asks where the server is: in this process or across a network is the party's
business. A new method is a new function here, never a flag on an old one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hosl.core.clipping import PLAIN, CoefficientControl
from hosl.core.estimators import central_difference, difference_quotient, loss_noise
from hosl.core.protocols import (
    ClientSide,
    FirstOrderClientSide,
    FirstOrderServerSide,
    ForwardModeClientSide,
    GuidedClientSide,
    MeanStepServerSide,
    NodeClientSide,
    NoisyClientSide,
    NoisyServerSide,
    OneSidedClientSide,
    ZerothOrderClientSide,
    ZerothOrderServerSide,
)
from hosl.core.targets import Batch


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one step of any method reports."""

    loss: float
    """Mean training loss at the weights that entered the step, in nats."""
    coefficients: tuple[float, ...] = ()
    """c_q, the directional derivatives that the client measured; empty for methods without probes."""
    rejected: int = 0
    """Directions that contributed nothing, because their losses or projection were NaN or infinite."""
    noise: float | None = None
    """Rounding floor of c_q (`estimators.loss_noise`); None where c_q is no difference quotient."""

    @property
    def signal(self) -> float:
        """Root mean square of c_q: near `noise`, epsilon is too small."""
        return math.sqrt(math.fsum(c_q * c_q for c_q in self.coefficients) / max(len(self.coefficients), 1))


def hosl_round(
    client: ZerothOrderClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """One step of HOSL (arXiv 2601.10940, Alg. 1): zeroth-order client, first-order server."""
    answers = []
    for h_plus, h_minus in client.probes(batch, seeds, epsilon):  # l.1 l.2 l.3
        answers.append(
            server.losses([h_plus, h_minus], batch.targets)
        )  # l.4  may arrive during the next probe
        del h_plus, h_minus  # or they would be held while the next pair, or the clean h, is computed
    probes = control.judge([difference_quotient(plus, minus, epsilon) for plus, minus in answers])  # l.5
    reply = server.step(client.forward(batch), batch.targets, step=step)  # l.6 l.7  the UNPERTURBED client
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)  # l.8  deferred, mean over Q
    noise = loss_noise([loss for pair in answers for loss in pair], epsilon)
    return RoundResult(reply.loss, probes.measured, probes.rejected, noise)


def hosl_first_plus_round(
    client: ZerothOrderClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """As `hosl_round`, the server's gradient at the first + probe in place of the clean pass: 2Q forwards and uploads.

    Its loss is that probe's. Source: paper.md D1, as the authors' code has it.
    """
    h_first, answers = None, []
    for h_plus, h_minus in client.probes(batch, seeds, epsilon):  # l.1 l.2 l.3
        if h_first is None:
            h_first = h_plus  # its loss comes with the server's step
            answers.append(server.losses([h_minus], batch.targets))
        else:
            answers.append(server.losses([h_plus, h_minus], batch.targets))
        del h_plus, h_minus
    reply = server.step(h_first, batch.targets, step=step)  # l.7
    (minus,), *others = answers
    losses = [(reply.loss, minus), *others]
    probes = control.judge([difference_quotient(plus, minus, epsilon) for plus, minus in losses])  # l.5
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)  # l.8
    noise = loss_noise([loss for pair in losses for loss in pair], epsilon)
    return RoundResult(reply.loss, probes.measured, probes.rejected, noise)


def hosl_mean_plus_round(
    client: ZerothOrderClientSide,
    server: MeanStepServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """As `hosl_round`, the server's gradient that of the mean loss over all + probes: 2Q forwards and uploads.

    Its loss is that mean. All Q activations h+ are held until the server's step. Source: paper.md section 11.
    """
    pluses, minuses = [], []
    for h_plus, h_minus in client.probes(batch, seeds, epsilon):  # l.1 l.2 l.3
        pluses.append(h_plus)
        minuses.append(server.losses([h_minus], batch.targets))
    plus_losses = server.step_at_mean(pluses, batch.targets, step=step)  # l.7
    losses = [(plus, minus) for plus, (minus,) in zip(plus_losses, minuses, strict=True)]
    probes = control.judge([difference_quotient(plus, minus, epsilon) for plus, minus in losses])  # l.5
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)  # l.8
    noise = loss_noise([loss for pair in losses for loss in pair], epsilon)
    return RoundResult(math.fsum(plus_losses) / len(plus_losses), probes.measured, probes.rejected, noise)


def hosl_gradient_round(
    client: ZerothOrderClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """HOSL with a returned gradient: the server sends dL/dh once, the client projects its probes on it.

    One upload, one download, one round trip, any Q. Source: methods.md (a), two-sided.
    """
    reply = server.step(client.forward(batch), batch.targets, step=step, want_gradient=True)  # l.6 l.7
    found = list(client.projections(batch, seeds, epsilon, reply.gradient))  # l.1 to l.5, at the client
    probes = control.judge([control.total(p.rows) for p in found])
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)  # l.8
    return RoundResult(reply.loss, probes.measured, probes.rejected, probes.of(found)[0].noise)


def hosl_gradient_one_sided_round(
    client: OneSidedClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """As `hosl_gradient_round`, with Q + 1 forward passes: the clean one stands in for h-.

    The error is first order in epsilon. Source: methods.md (a), one-sided.
    """
    h = client.forward(batch)
    reply = server.step(h, batch.targets, step=step, want_gradient=True)  # l.6 l.7
    found = list(client.one_sided_projections(batch, h, seeds, epsilon, reply.gradient))
    probes = control.judge([control.total(p.rows) for p in found])
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)  # l.8
    return RoundResult(reply.loss, probes.measured, probes.rejected, probes.of(found)[0].noise)


def hosl_gradient_forward_mode_round(
    client: ForwardModeClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """As `hosl_gradient_round`, with exact directional derivatives <g, J u>. Source: methods.md (e)."""
    reply = server.step(client.forward(batch), batch.targets, step=step, want_gradient=True)  # l.6 l.7
    probes = control.judge([control.total(p.rows) for p in client.tangents(batch, seeds, reply.gradient)])
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)  # l.8
    return RoundResult(reply.loss, probes.measured, probes.rejected)


def hosl_guided_round(
    client: GuidedClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """HOSL along directions formed from the returned gradient; one per tensor, no seeds. methods.md (i).

    Biased: a tensor moves by its gradient's projection on one direction. One upload, one download.
    """
    h = client.forward_for_guides(batch)
    reply = server.step(h, batch.targets, step=step, want_gradient=True)  # l.6 l.7
    names = client.guide(reply.gradient)  # in place of l.2: u from the data, not from a seed
    probes = control.judge([client.slope(name, reply.gradient, epsilon) for name in names])  # l.3 to l.5
    client.descend_along(probes.of(names), probes.coefficients, learning_rate)  # l.8
    return RoundResult(reply.loss, probes.measured, probes.rejected)


def hosl_node_round(
    client: NodeClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
) -> RoundResult:
    """As `hosl_guided_round`, and the last block's queries by node perturbation. Source: methods.md (i).

    Its coefficients: the output projections' slopes, then for each seed the sum of its tokens' slopes.
    """
    h = client.forward_for_guides(batch)
    reply = server.step(h, batch.targets, step=step, want_gradient=True)  # l.6 l.7
    names = client.guide(reply.gradient)
    projections = PLAIN.judge([client.slope(name, reply.gradient, epsilon) for name in names])
    slopes = list(
        client.node_slopes(h, seeds, epsilon, reply.gradient)
    )  # l.1 to l.5, a scalar for each token
    nodes = PLAIN.judge([float(of_tokens.sum()) for of_tokens in slopes])
    client.descend_nodes(nodes.of(seeds), nodes.of(slopes), learning_rate)  # l.8
    client.descend_along(projections.of(names), projections.coefficients, learning_rate)
    return RoundResult(
        reply.loss, (*projections.measured, *nodes.measured), rejected=projections.rejected + nodes.rejected
    )


def fo_round(
    client: FirstOrderClientSide,
    server: FirstOrderServerSide,
    batch: Batch,
    *,
    step: int,
    learning_rate: float,
) -> RoundResult:
    """FO-FO, ordinary split learning: backprop through both halves. Source: paper.md section 4."""
    h = client.forward_for_backward(batch)
    reply = server.step(h, batch.targets, step=step, want_gradient=True)
    client.backward(reply.gradient, learning_rate)
    return RoundResult(loss=reply.loss)


def zo_round(
    client: ZerothOrderClientSide,
    server: ZerothOrderServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    server_seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """ZO-ZO: both halves perturbed together, independent directions (I7), both updated after the probes.

    Source: paper.md section 4. The loss is the mean of the accepted probes' losses: no clean forward is made.
    """
    pairs = client.probes(batch, seeds, epsilon)  # taken one by one: none is held while the next is computed
    answers = [server.probe(next(pairs), batch.targets, seed, epsilon) for seed in server_seeds]
    probes = control.judge([difference_quotient(plus, minus, epsilon) for plus, minus in answers])
    server.descend(step, probes.of(server_seeds), probes.coefficients)
    client.descend(step, probes.of(seeds), probes.coefficients, learning_rate)
    losses = [loss for pair in probes.of(answers) for loss in pair]
    noise = loss_noise(losses, epsilon)
    return RoundResult(sum(losses) / len(losses), probes.measured, probes.rejected, noise)


def fo_zo_round(
    client: FirstOrderClientSide,
    server: ZerothOrderServerSide,
    batch: Batch,
    *,
    step: int,
    server_seeds: Sequence[int],
    epsilon: float,
    learning_rate: float,
    control: CoefficientControl = PLAIN,
) -> RoundResult:
    """FO-ZO: first-order client, zeroth-order server. Exists in the authors' code; kept for completeness.

    dL/dh comes from a backward pass through the server at the theta_s that entered the step; only the server's own
    weights are trained by probes. The client's forward is made once.
    """
    h = client.forward_for_backward(batch)
    reply = server.gradient(h, batch.targets)
    answers = [server.probe((h, h), batch.targets, seed, epsilon) for seed in server_seeds]
    probes = control.judge([difference_quotient(plus, minus, epsilon) for plus, minus in answers])
    server.descend(step, probes.of(server_seeds), probes.coefficients)
    client.backward(reply.gradient, learning_rate)
    noise = loss_noise([loss for pair in answers for loss in pair], epsilon)
    return RoundResult(reply.loss, probes.measured, probes.rejected, noise)


def frozen_round(client: ClientSide, server: FirstOrderServerSide, batch: Batch, *, step: int) -> RoundResult:
    """The client never changes; the server trains. The row that every comparison owes (paper.md H0)."""
    reply = server.step(client.forward(batch), batch.targets, step=step)  # l.6 l.7
    return RoundResult(loss=reply.loss)


def authors_head_round(
    client: NoisyClientSide,
    server: NoisyServerSide,
    batch: Batch,
    *,
    step: int,
    seeds: Sequence[int],
    dropout_seed: int,
    epsilon: float,
    learning_rate: float,
) -> RoundResult:
    """HOSL as the authors' published code runs it (HEAD 60c4a12); the profile authors-head. Never a recommendation.

    Against the paper: the server's gradient is taken at the first +epsilon probe (D1), dropout is on in that probe and
    off in its twin (D2), and the client moves after every pair (D6). 2Q uploads, none of them clean.
    """
    h_first, h_minus = client.probe_with_dropout(batch, seeds[0], epsilon, dropout_seed)  # D2
    loss_plus = server.loss_with_dropout(h_first, batch.targets, dropout_seed)
    (loss_minus,) = server.losses([h_minus], batch.targets)
    coefficients = [central_difference(loss_plus, loss_minus, epsilon)]
    client.descend(step, seeds[:1], [coefficients[0] / len(seeds)], learning_rate)  # D6
    for seed in seeds[1:]:
        ((h_plus, h_minus),) = client.probes(batch, [seed], epsilon)
        loss_plus, loss_minus = server.losses([h_plus, h_minus], batch.targets)
        coefficients.append(central_difference(loss_plus, loss_minus, epsilon))
        client.descend(step, [seed], [coefficients[-1] / len(seeds)], learning_rate)  # D6
    reply = server.step_with_dropout(h_first, batch.targets, step=step, dropout_seed=dropout_seed)  # D1
    return RoundResult(loss=reply.loss, coefficients=tuple(coefficients))
