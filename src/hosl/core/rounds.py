"""Every algorithm as one function of two parties, one statement per line of the paper.

Start here. "line 4" is line 4 of Alg. 1 in arXiv 2601.10940, as docs/concepts/algorithm.md numbers it. All rounds have
one signature, so that the table of methods (`core.methods`) can name them. A round never looks inside an activation
and does not know where the server is, in this process or across a network. A new method is a new function here, never
a flag on an old one.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from hosl.core.clipping import PLAIN, CoefficientControl
from hosl.core.estimators import difference_quotient, loss_noise
from hosl.core.protocols import (
    ClientSide,
    FirstOrderClientSide,
    FirstOrderServerSide,
    GuidedClientSide,
    NodeClientSide,
    ResidualClientSide,
    ZerothOrderClientSide,
    ZerothOrderServerSide,
)
from hosl.core.targets import Batch


@dataclass(frozen=True, slots=True)
class RoundResult:
    """The result of one step of any method."""

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


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The numbers that a step is given beside its batch: all that a round of any method may read."""

    number: int
    """The step, from 1."""
    _: KW_ONLY
    seeds: Sequence[int] = ()
    """Q seeds, one for each direction of the client."""
    server_seeds: Sequence[int] = ()
    """One seed for each direction of a zeroth-order server."""
    epsilon: float = 1e-3
    """The perturbation scale: the parameters are evaluated at theta +- epsilon u."""
    learning_rate: float = 0.0
    """eta_c of the client's update; the server has its own."""
    control: CoefficientControl = PLAIN
    """The treatment of the measured coefficients; by default only NaN and Inf are rejected."""


def hosl_round(
    client: ZerothOrderClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of HOSL (arXiv 2601.10940, Alg. 1): zeroth-order client, first-order server."""
    replies = []
    for h_plus, h_minus in client.probes(batch, step.seeds, step.epsilon):  # lines 1 to 3
        # line 4; the reply may arrive during the next probe
        replies.append(server.losses([h_plus, h_minus], batch.targets))
        del h_plus, h_minus  # or they would be held while the next pair, or the clean h, is computed
    quotients = [difference_quotient(plus, minus, step.epsilon) for plus, minus in replies]  # line 5
    probes = step.control.judge(quotients)
    h = client.forward(batch)  # line 6, at the UNPERTURBED client
    reply = server.step(h, batch.targets, step=step.number)  # line 7
    del h  # or it would be held while the client moves
    client.descend(step.number, probes.of(step.seeds), probes.coefficients, step.learning_rate)  # line 8
    noise = loss_noise([loss for pair in replies for loss in pair], step.epsilon)
    return RoundResult(reply.loss, probes.measured, probes.rejected, noise)


def hosl_first_plus_round(
    client: ZerothOrderClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of HOSL with the server's gradient at the first + probe, in place of the clean pass.

    2Q forwards and uploads; the loss is that probe's. Source: paper.md D1, as the authors' code has it.
    """
    h_first, replies = None, []
    for h_plus, h_minus in client.probes(batch, step.seeds, step.epsilon):  # lines 1 to 3
        if h_first is None:
            h_first = h_plus  # its loss comes with the server's step
            replies.append(server.losses([h_minus], batch.targets))
        else:
            replies.append(server.losses([h_plus, h_minus], batch.targets))
        del h_plus, h_minus
    reply = server.step(h_first, batch.targets, step=step.number)  # line 7
    (minus,), *others = replies
    losses = [(reply.loss, minus), *others]
    probes = step.control.judge([difference_quotient(plus, minus, step.epsilon) for plus, minus in losses])
    client.descend(step.number, probes.of(step.seeds), probes.coefficients, step.learning_rate)  # line 8
    noise = loss_noise([loss for pair in losses for loss in pair], step.epsilon)
    return RoundResult(reply.loss, probes.measured, probes.rejected, noise)


def hosl_gradient_round(
    client: ZerothOrderClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of HOSL with a returned gradient: the server sends dL/dh once, the client projects its probes on it.

    One upload, one download, one round trip, any Q. Source: methods.md (a), two-sided.
    """
    h = client.forward(batch)  # line 6
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)  # line 7
    del h  # or it would be held while the probes are evaluated
    projections = list(client.projections(batch, step.seeds, step.epsilon, reply.gradient))  # lines 1 to 5
    probes = step.control.judge([step.control.total(p.rows) for p in projections])
    client.descend(step.number, probes.of(step.seeds), probes.coefficients, step.learning_rate)  # line 8
    return RoundResult(reply.loss, probes.measured, probes.rejected, probes.of(projections)[0].noise)


def hosl_gradient_one_sided_round(
    client: ZerothOrderClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of `hosl_gradient_round` with Q + 1 forward passes: the clean one stands in for h-.

    The error is first order in epsilon. Source: methods.md (a), one-sided.
    """
    h = client.forward(batch)
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)  # line 7
    # lines 1 to 5
    projections = list(client.one_sided_projections(batch, h, step.seeds, step.epsilon, reply.gradient))
    probes = step.control.judge([step.control.total(p.rows) for p in projections])
    client.descend(step.number, probes.of(step.seeds), probes.coefficients, step.learning_rate)  # line 8
    return RoundResult(reply.loss, probes.measured, probes.rejected, probes.of(projections)[0].noise)


def hosl_gradient_forward_mode_round(
    client: ZerothOrderClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of `hosl_gradient_round` with exact directional derivatives <g, J u>. Source: methods.md (e)."""
    h = client.forward(batch)  # line 6
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)  # line 7
    del h  # or it would be held while the probes are evaluated
    tangents = client.tangents(batch, step.seeds, reply.gradient)
    probes = step.control.judge([step.control.total(p.rows) for p in tangents])
    client.descend(step.number, probes.of(step.seeds), probes.coefficients, step.learning_rate)  # line 8
    return RoundResult(reply.loss, probes.measured, probes.rejected)


def hosl_residual_round(
    client: ResidualClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of HOSL in which every output projection takes the returned gradient for its own; no directions.

    One upload, one download, no slope. Biased: exact in the last layer, less so further down. Source: methods.md (o).
    """
    h = client.forward_keeping_inputs(batch)  # line 6
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)  # line 7
    del h  # or it would be held while layers are evaluated again
    client.descend_by_feedback(reply.gradient, step.learning_rate)  # in place of lines 1 to 5 and 8
    return RoundResult(reply.loss)


def hosl_residual_slopes_round(
    client: GuidedClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of `hosl_residual_round` whose length is measured: two evaluations for each group of layers.

    A group moves by its gradient's projection on the direction that residual feedback gives it, so never uphill.
    """
    h = client.forward_keeping_inputs(batch)
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)  # line 7
    names = client.guide(reply.gradient)  # in place of line 2: u from the data, not from a seed
    slopes = [client.slope(name, reply.gradient, step.epsilon) for name in names]  # lines 3 to 5
    probes = PLAIN.judge(slopes)
    client.descend_along(probes.of(names), probes.coefficients, step.learning_rate)  # line 8
    return RoundResult(reply.loss, probes.measured, probes.rejected)


def hosl_node_round(
    client: NodeClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step along directions formed from the gradient, and the last block's queries by node perturbation.

    A slope for each output projection, as in `hosl_residual_slopes_round` for a group. Source: methods.md (i).

    Its coefficients: the output projections' slopes, then for each seed the sum of its tokens' slopes.
    """
    h = client.forward_keeping_inputs(batch)
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)  # line 7
    names = client.guide(reply.gradient)
    projections = PLAIN.judge([client.slope(name, reply.gradient, step.epsilon) for name in names])
    slopes = list(client.node_slopes(h, step.seeds, step.epsilon, reply.gradient))  # one for each token
    nodes = PLAIN.judge([float(token_slopes.sum()) for token_slopes in slopes])
    client.descend_nodes(nodes.of(step.seeds), nodes.of(slopes), step.learning_rate)  # line 8
    client.descend_along(projections.of(names), projections.coefficients, step.learning_rate)
    measured = (*projections.measured, *nodes.measured)
    return RoundResult(reply.loss, measured, rejected=projections.rejected + nodes.rejected)


def fo_round(
    client: FirstOrderClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of FO-FO, ordinary split learning: backprop through both halves. Source: paper.md section 4."""
    h = client.forward_for_backward(batch)
    reply = server.step(h, batch.targets, step=step.number, want_gradient=True)
    del h  # or it would be held during the backward pass
    client.backward(reply.gradient, step.learning_rate)
    return RoundResult(loss=reply.loss)


def zo_round(
    client: ZerothOrderClientSide, server: ZerothOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of ZO-ZO: both halves perturbed together, independent directions, both updated after the probes.

    The loss is the mean of the accepted probes' losses: no clean forward is made. Source: paper.md section 4, I7.
    """
    # one by one: none is held while the next is computed
    pairs = client.probes(batch, step.seeds, step.epsilon)
    replies = [server.probe(next(pairs), batch.targets, seed, step.epsilon) for seed in step.server_seeds]
    probes = step.control.judge([difference_quotient(plus, minus, step.epsilon) for plus, minus in replies])
    server.descend(step.number, probes.of(step.server_seeds), probes.coefficients)
    client.descend(step.number, probes.of(step.seeds), probes.coefficients, step.learning_rate)
    losses = [loss for pair in probes.of(replies) for loss in pair]
    noise = loss_noise(losses, step.epsilon)
    return RoundResult(sum(losses) / len(losses), probes.measured, probes.rejected, noise)


def fo_zo_round(
    client: FirstOrderClientSide, server: ZerothOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of FO-ZO: first-order client, zeroth-order server. In the authors' code; kept for completeness.

    dL/dh comes from a backward pass through the server at the theta_s that entered the step; only the server's own
    weights are trained by probes. The client's forward is made once.
    """
    h = client.forward_for_backward(batch)
    reply = server.gradient(h, batch.targets)
    replies = [server.probe((h, h), batch.targets, seed, step.epsilon) for seed in step.server_seeds]
    probes = step.control.judge([difference_quotient(plus, minus, step.epsilon) for plus, minus in replies])
    server.descend(step.number, probes.of(step.server_seeds), probes.coefficients)
    client.backward(reply.gradient, step.learning_rate)
    noise = loss_noise([loss for pair in replies for loss in pair], step.epsilon)
    return RoundResult(reply.loss, probes.measured, probes.rejected, noise)


def frozen_round(
    client: ClientSide, server: FirstOrderServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step in which only the server trains: the baseline of every comparison (paper.md H0)."""
    reply = server.step(client.forward(batch), batch.targets, step=step.number)  # lines 6 and 7
    return RoundResult(loss=reply.loss)
