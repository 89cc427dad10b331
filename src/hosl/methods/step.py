"""What a step of a config's method is: which round, with which seeds, rates and control. No torch.

The rounds: `hosl.core.rounds`. The parties of a method on PyTorch: `torch_parties`.
"""

from collections.abc import Callable
from typing import Any

from hosl.config import Config
from hosl.core.clipping import CoefficientControl
from hosl.core.directions import direction_seed
from hosl.core.rounds import (
    RoundResult,
    authors_head_round,
    fo_round,
    fo_zo_round,
    frozen_round,
    hosl_first_plus_round,
    hosl_gradient_forward_mode_round,
    hosl_gradient_one_sided_round,
    hosl_gradient_round,
    hosl_guided_round,
    hosl_mean_plus_round,
    hosl_node_round,
    hosl_round,
    zo_round,
)
from hosl.core.targets import Batch
from hosl.methods.schedule import learning_rate


def coefficient_control(config: Config) -> CoefficientControl:
    """What the config says of a step's coefficients, with nothing to look back on."""
    return CoefficientControl(clip=config.zo.clip, row_clip=config.zo.row_clip, normalise=config.zo.normalise)


def method_round(
    config: Config,
    client: Any,
    server: Any,
    batch: Batch,
    step: int,
    *,
    half: str = "client",
    control: CoefficientControl | None = None,
) -> RoundResult:
    """One step of the config's method between two parties.

    Args:
        config: method, seed, zo settings and learning rate.
        client: has the calls that the method asks for.
        server: likewise.
        batch: of this step.
        step: from 1.
        half: the name under which the client draws its directions.
        control: of the step's coefficients; None: the config's, with nothing to look back on.
    """
    zo = config.zo
    seeds = {"seeds": [direction_seed(config.seed, step, q, half) for q in range(zo.directions)]}
    of_server = {
        "server_seeds": [direction_seed(config.seed, step, q, "server") for q in range(zo.directions)]
    }
    epsilon = {"epsilon": zo.epsilon}
    eta = {"learning_rate": learning_rate(config, config.client_rate)(step)}
    if config.profile == "authors-head":
        dropout = {"dropout_seed": direction_seed(config.seed, step, 0, "server")}
        settings: dict[str, Any] = dropout | seeds | epsilon | eta
        return authors_head_round(client, server, batch, step=step, **settings)
    controlled = {"control": control or coefficient_control(config)}
    rounds: dict[str, tuple[Callable[..., RoundResult], dict[str, Any]]] = {
        "hosl": (hosl_round, seeds | epsilon | eta | controlled),
        "hosl, first-plus": (hosl_first_plus_round, seeds | epsilon | eta | controlled),
        "hosl, mean-plus": (hosl_mean_plus_round, seeds | epsilon | eta | controlled),
        "hosl-gradient": (hosl_gradient_round, seeds | epsilon | eta | controlled),
        "hosl-gradient, one-sided": (hosl_gradient_one_sided_round, seeds | epsilon | eta | controlled),
        "hosl-gradient, forward-mode": (hosl_gradient_forward_mode_round, seeds | eta | controlled),
        "hosl-guided": (hosl_guided_round, epsilon | eta | controlled),
        "hosl-node": (hosl_node_round, seeds | epsilon | eta),
        "fo-fo": (fo_round, eta),
        "fo-recompute": (fo_round, eta),
        "zo-zo": (zo_round, seeds | of_server | epsilon | eta | controlled),
        "fo-zo": (fo_zo_round, of_server | epsilon | eta | controlled),
        "frozen": (frozen_round, {}),
    }
    variant = config.method
    if config.zo.server_gradient_at != "clean":
        variant += f", {config.zo.server_gradient_at}"
    if config.zo.sides == "one":
        variant += ", one-sided"
    if config.zo.derivative == "forward-mode":
        variant += ", forward-mode"
    method, settings = rounds[variant]
    return method(client, server, batch, step=step, **settings)
