"""The state of a run, wherever its server is: config, task, two parties under meters, and the steps done. No torch.

In one process: `local_session.LocalSession`. With the server elsewhere: `network.joined_session.JoinedSession`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from hosl.config import Config
from hosl.core.clipping import CoefficientControl
from hosl.core.protocols import ClientSide, ServerSide
from hosl.core.rounds import RoundResult
from hosl.core.targets import Batch
from hosl.methods.step import coefficient_control, method_round
from hosl.parties.metered import Meter, metered
from hosl.tasks import Task

ClientT = TypeVar("ClientT", bound=ClientSide)
ServerT = TypeVar("ServerT")  # a `ServerSide`, or a trunk without the head that a client holds


@dataclass
class Meters:
    """One meter per party."""

    client: Meter = field(default_factory=Meter)
    server: Meter = field(default_factory=Meter)


@dataclass
class Session(Generic[ClientT, ServerT]):
    """A split model in training: its task, its two parties and their state."""

    config: Config
    task: Task
    client: ClientT
    """The client party; it follows the protocol that the round of the config's method declares, like `server`."""
    server: ServerT
    facts: dict[str, Any] = field(default_factory=dict)
    """The facts for the run's record about model and task: source, digests, cut, family, new weights."""
    step: int = 0
    """Steps done."""
    best: tuple[float, float] | None = None
    """Accuracy and negative loss of the best evaluation on dev so far, with save_best; None: none yet, or not known."""
    meters: Meters = field(default_factory=Meters)
    control: CoefficientControl = field(init=False)
    """The control of the coefficients after `step`; its state goes into checkpoints."""

    def __post_init__(self) -> None:
        self.control = coefficient_control(self.config)

    def round(self, batch: Batch, step: int) -> RoundResult:
        """Make one step of the config's method between the two parties, under their meters.

        Raises:
            NonFiniteError: if a loss or an activation is NaN or infinite.
            StepMoved: if the server goes on from another step.
        """
        client = metered(self.client, self.meters.client)
        server = self.server_to_call(in_round=True)
        result = method_round(self.config, client, server, batch, step, control=self.control)
        self.control = self.control.after(result.coefficients)
        return result

    def server_to_call(self, *, in_round: bool) -> ServerSide:
        """The server that the client calls under its meter, with all that is between the two."""
        return metered(cast(ServerSide, self.server), self.meters.server)

    def count_anew(self) -> None:
        """Forget the costs so far: those of what comes next are counted by themselves."""
        for meter in (self.meters.client, self.meters.server):
            meter.take()
        self.costs()

    def stop_when(self, stopping: Callable[[], bool]) -> None:
        """Note the function that says whether the run is to end; only a server elsewhere is waited for."""

    def measure_memory(self, *, on: bool) -> None:
        """Start or stop measuring the memory of the parties' calls."""
        raise NotImplementedError

    def save(self, run: Path, facts: dict[str, Any]) -> None:
        """Write a checkpoint of the present state below `run`; `go_to` returns its `facts`."""
        raise NotImplementedError

    def save_best(self, run: Path) -> None:
        """Keep the weights of the present state below `run`, in place of those that were the best before."""
        raise NotImplementedError

    def inputs(self) -> dict[str, str]:
        """The facts of a checkpoint by which a later command knows that model, data and directions are the same."""
        return {
            "model_digest": self.facts["model"]["digest"],
            "task_digest": self.facts["task"]["digest"],
            "distribution": self.config.zo.distribution,
        }

    def go_to(self, run: Path, step: int) -> dict[str, Any] | None:
        """Take the state after `step`, because the other side has it.

        Returns the facts of the checkpoint of that state; None if no step is undone.
        """
        raise NotImplementedError

    def done(self, step: int) -> None:
        """Note that the round of `step` is complete on both sides."""
        self.step = step

    def costs(self) -> dict[str, Any]:
        """The costs since the last call that the parties' meters do not hold, for timings.jsonl."""
        return {}

    def notes(self) -> dict[str, float]:
        """The measurements of the last step beside its result, for metrics.jsonl; the same in every repetition."""
        return {}

    def client_bytes(self) -> float:
        """The peak memory of the client's process so far, bytes; a budget is compared with it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the session after the last step, while the server can still be called."""
