"""One step of a config's method: its row's round, with the seeds, rates and control of that step. No torch.

The rounds: `hosl.core.rounds`. The parties of a method on PyTorch: `torch_parties`.
"""

from hosl.config import Config
from hosl.core.clipping import CoefficientControl
from hosl.core.directions import direction_seed
from hosl.core.protocols import ClientSide, ServerSide
from hosl.core.rounds import RoundResult, StepInputs
from hosl.core.targets import Batch
from hosl.methods.schedule import learning_rate


def coefficient_control(config: Config) -> CoefficientControl:
    """The config's coefficient control, without coefficients of earlier steps."""
    return CoefficientControl(clip=config.zo.clip, row_clip=config.zo.row_clip, normalise=config.zo.normalise)


def method_round(
    config: Config,
    client: ClientSide,
    server: ServerSide,
    batch: Batch,
    step: int,
    *,
    half: str = "client",
    control: CoefficientControl | None = None,
) -> RoundResult:
    """One step of the config's method between two parties.

    Args:
        config: the run's config; method, seed, zo settings and learning rate are read.
        client: a client with the protocol that the method's round declares.
        server: a server with the protocol that the method's round declares.
        batch: the batch of this step.
        step: the step, from 1.
        half: the name by which the client draws its directions.
        control: the coefficient control of this step; None: `coefficient_control(config)`.
    """

    def seeds(of_half: str) -> list[int]:
        return [direction_seed(config.seed, step, q, of_half) for q in range(config.zo.directions)]

    inputs = StepInputs(
        step,
        seeds=seeds(half),
        server_seeds=seeds("server"),
        epsilon=config.zo.epsilon,
        learning_rate=learning_rate(config, config.client_rate)(step),
        control=control or coefficient_control(config),
    )
    return config.method_row.round_for(config.setting)(client, server, batch, inputs)
