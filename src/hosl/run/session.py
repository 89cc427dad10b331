"""What every run has, wherever its server is: a config, a task, two parties under meters, and the steps done. No torch.

In one process: `local.LocalSession`. With the server elsewhere: `join.JoinedSession`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.core.directions import direction_seed
from hosl.core.parties import Batch
from hosl.core.rounds import (
    RoundResult,
    authors_head_round,
    fo_round,
    fo_zo_round,
    frozen_round,
    hosl_gradient_forward_mode_round,
    hosl_gradient_one_sided_round,
    hosl_gradient_round,
    hosl_guided_round,
    hosl_node_round,
    hosl_round,
    zo_round,
)
from hosl.core.step_control import StepControl
from hosl.parties.metered import Meter, Metered
from hosl.run.schedule import learning_rate
from hosl.tasks import Task


@dataclass
class Meters:
    """One meter per party."""

    client: Meter = field(default_factory=Meter)
    server: Meter = field(default_factory=Meter)


@dataclass
class Session:
    """A split model in training: its task and the two parties."""

    config: Config
    task: Task
    client: Any
    """A `ClientSide` that has the verbs of the config's method."""
    server: Any
    """A `ServerSide` likewise."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the run's record says of model and task: source, digests, cut, family, new weights."""
    step: int = 0
    """Steps done."""
    meters: Meters = field(default_factory=Meters)
    control: StepControl = field(init=False)
    """Of the steps after `step`; its memory goes into checkpoints."""

    def __post_init__(self) -> None:
        self.control = step_control(self.config)

    def round(self, batch: Batch, step: int) -> RoundResult:
        """One step of the config's method between the two parties, under their meters."""
        client, server = Metered(self.client, self.meters.client), Metered(self.server, self.meters.server)
        result = method_round(self.config, client, server, batch, step, control=self.control)
        self.control = self.control.after(result.coefficients)
        return result

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the parties' verbs."""
        raise NotImplementedError

    def save(self, run: Path, facts: dict[str, Any]) -> None:
        """A checkpoint of the state at hand below `run`; `facts` come back from `go_to`."""
        raise NotImplementedError

    def go_to(self, run: Path, step: int) -> dict[str, Any] | None:
        """Take the state after `step`, because the other side has it.

        Returns the facts of the checkpoint that it came from; None when nothing that was done is undone.
        """
        raise NotImplementedError

    def done(self, step: int) -> None:
        """The round of `step` is complete on both sides."""
        self.step = step

    def costs(self) -> dict[str, Any]:
        """What the last step cost beyond what the parties' meters say; goes to timings.jsonl."""
        return {}

    def notes(self) -> dict[str, float]:
        """What the last step measured beside its result, exact; goes to metrics.jsonl."""
        return {}

    def finish(self) -> None:
        """The last step is done; nothing more will be asked."""


def step_control(config: Config) -> StepControl:
    """What the config says of a step's coefficients, with nothing to look back on."""
    return StepControl(clip=config.zo.clip, row_clip=config.zo.row_clip, normalise=config.zo.normalise)


def method_round(
    config: Config,
    client: Any,
    server: Any,
    batch: Batch,
    step: int,
    *,
    half: str = "client",
    control: StepControl | None = None,
) -> RoundResult:
    """One step of the config's method between two parties.

    Args:
        config: method, seed, zo settings and learning rate.
        client: has the verbs that the method asks for.
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
    controlled = {"control": control or step_control(config)}
    rounds: dict[str, tuple[Callable[..., RoundResult], dict[str, Any]]] = {
        "hosl": (hosl_round, seeds | epsilon | eta | controlled),
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
    if config.zo.sides == "one":
        variant += ", one-sided"
    if config.zo.derivative == "forward-mode":
        variant += ", forward-mode"
    method, settings = rounds[variant]
    return method(client, server, batch, step=step, **settings)
