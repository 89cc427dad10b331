"""The round of the profile authors-head, and the protocols of its two parties. Never a recommendation.

It exists so that a difference between our numbers and the published ones has a name (docs/concepts/algorithm.md).
The parties: `hosl.parties.authors_head`.
"""

from typing import Protocol, runtime_checkable

from hosl.core.estimators import central_difference
from hosl.core.protocols import FirstOrderServerSide, ZerothOrderClientSide
from hosl.core.rounds import RoundResult, StepInputs
from hosl.core.targets import Activations, Batch, Pair, StepReply, Targets


@runtime_checkable
class NoisyClientSide(ZerothOrderClientSide, Protocol):
    """A client that can also probe as the authors' published code does; for the profile authors-head only."""

    def probe_with_dropout(self, batch: Batch, seed: int, epsilon: float, dropout_seed: int) -> Pair:
        """The pair of one seed: h+ with dropout on, h- with dropout off (paper.md D2)."""
        ...


@runtime_checkable
class NoisyServerSide(FirstOrderServerSide, Protocol):
    """A server that can also reply as the authors' published code does; for the profile authors-head only."""

    def loss_with_dropout(self, activations: Activations, targets: Targets, dropout_seed: int) -> float:
        """The mean loss with dropout on. theta_s unchanged."""
        ...

    def step_with_dropout(
        self, activations: Activations, targets: Targets, *, step: int, dropout_seed: int
    ) -> StepReply:
        """One update of theta_s, with the dropout that `loss_with_dropout` drew from the same seed."""
        ...


def authors_head_round(
    client: NoisyClientSide, server: NoisyServerSide, batch: Batch, step: StepInputs
) -> RoundResult:
    """One step of HOSL as the authors' published code runs it (HEAD 60c4a12).

    Against the paper: the server's gradient is taken at the first + probe (D1), dropout is on in that probe and off in
    its - probe (D2), and the client moves after every pair (D6). 2Q uploads, none of them clean. The first of the
    server's seeds draws the dropout.
    """
    dropout_seed = step.server_seeds[0]
    h_first, h_minus = client.probe_with_dropout(batch, step.seeds[0], step.epsilon, dropout_seed)  # D2
    loss_plus = server.loss_with_dropout(h_first, batch.targets, dropout_seed)
    (loss_minus,) = server.losses([h_minus], batch.targets)
    coefficients = [central_difference(loss_plus, loss_minus, step.epsilon)]
    directions = len(step.seeds)
    client.descend(step.number, step.seeds[:1], [coefficients[0] / directions], step.learning_rate)  # D6
    for seed in step.seeds[1:]:
        ((h_plus, h_minus),) = client.probes(batch, [seed], step.epsilon)
        loss_plus, loss_minus = server.losses([h_plus, h_minus], batch.targets)
        coefficients.append(central_difference(loss_plus, loss_minus, step.epsilon))
        client.descend(step.number, [seed], [coefficients[-1] / directions], step.learning_rate)  # D6
    # D1
    reply = server.step_with_dropout(h_first, batch.targets, step=step.number, dropout_seed=dropout_seed)
    return RoundResult(loss=reply.loss, coefficients=tuple(coefficients))
