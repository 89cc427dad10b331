"""What every run has, wherever its server is: a config, a task, two parties under meters, and the steps done. No torch.

In one process: `local.LocalSession`. With the server elsewhere: `join.JoinedSession`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.core.clipping import CoefficientControl
from hosl.core.rounds import RoundResult
from hosl.core.targets import Batch
from hosl.methods.step import coefficient_control, method_round
from hosl.parties.metered import Meter, Metered
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
    """A `ClientSide` that has the calls of the config's method."""
    server: Any
    """A `ServerSide` likewise."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the run's record says of model and task: source, digests, cut, family, new weights."""
    step: int = 0
    """Steps done."""
    meters: Meters = field(default_factory=Meters)
    control: CoefficientControl = field(init=False)
    """Of the steps after `step`; its memory goes into checkpoints."""

    def __post_init__(self) -> None:
        self.control = coefficient_control(self.config)

    def round(self, batch: Batch, step: int) -> RoundResult:
        """One step of the config's method between the two parties, under their meters."""
        client = Metered(self.client, self.meters.client)
        server = self.asked_server(metered=True)
        result = method_round(self.config, client, server, batch, step, control=self.control)
        self.control = self.control.after(result.coefficients)
        return result

    def asked_server(self, *, metered: bool) -> Any:
        """What the client asks: the server, and whatever lies between the two."""
        return Metered(self.server, self.meters.server) if metered else self.server

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the parties' calls."""
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

    def client_bytes(self) -> float:
        """What the client's process has taken at most, so far; what a budget is compared with."""
        raise NotImplementedError

    def finish(self) -> None:
        """The last step is done; nothing more will be asked."""
