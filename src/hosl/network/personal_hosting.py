"""Server halves of several clients over one frozen base for the service: arrays in, arrays out, checkpoints of each."""

from collections.abc import Callable, Sequence
from typing import Any

from hosl.config import Config
from hosl.core.targets import AskedPositions
from hosl.errors import HoslError
from hosl.methods.torch_parties import prepare_server_half_, server_on
from hosl.network.torch_hosting import TorchHosted, stepped
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.parties.servers.personal import AskedStep, PersonalServers
from hosl.service.hosted_half import HostedHalf, OwnAsked, Stepped
from hosl.wire.tensors import WireArray

MOST_AT_ONCE = 1023
"""The clients of one pass at most, where all have a slot."""


class PersonalBank:
    """Implements `service.hosted_half.HostedBank`."""

    def __init__(self, config: Config, half: Any, new_weights: Sequence[str], *, slots: int | None) -> None:
        """Take over a half at its base weights.

        Args:
            config: the settings of the run, from its first Hello; trains adapters.
            half: a `ServerHalf`, or a `TrunkHalf` where the labels stay with the clients.
            new_weights: the names of weights that the checkpoint did not hold.
            slots: as of `PersonalServers`.
        """
        prepare_server_half_(config, half, new_weights)
        self._config = config

        def make_party(prepared: Any) -> Any:
            return server_on(config, prepared)

        self.servers = PersonalServers(half, make_party, slots=slots, device=config.server.device)

    def of(self, client: str) -> HostedHalf:
        """See `HostedBank`."""
        return _OneOfMany(self._config, self.servers, client)

    def forget(self, client: str) -> None:
        """See `HostedBank`."""
        self.servers.forget(client)

    @property
    def at_once(self) -> int:
        """See `HostedBank`."""
        return self.servers.slots or MOST_AT_ONCE

    def step_together(self, asked: Sequence[OwnAsked]) -> list[Stepped | HoslError]:
        """See `HostedBank`."""
        steps = [
            AskedStep(client, from_wire(one.activations[0]), one.targets, step, one.want_gradient)
            for client, one, step in asked
        ]
        replies = self.servers.steps(steps)
        return [reply if isinstance(reply, HoslError) else stepped(reply) for reply in replies]

    def losses_together(self, asked: Sequence[OwnAsked]) -> list[list[float]]:
        """See `HostedBank`."""
        return self.servers.losses(
            [(client, [from_wire(h) for h in one.activations], one.targets) for client, one, _ in asked]
        )


class _OneOfMany(TorchHosted):
    """The half of one client: its weights are in the shared half whenever it computes."""

    def __init__(self, config: Config, servers: PersonalServers, client: str) -> None:
        self._servers, self._client = servers, client
        super().__init__(config, lambda: servers.begin(client))

    @property
    def party(self) -> Any:
        """The client's server, its weights in the half; until another's computes."""
        return self._servers.of(self._client)

    @property
    def kept(self) -> Any:
        """The client's server, its weights wherever they are."""
        return self._servers.kept(self._client)

    @property
    def half(self) -> Any:
        """The shared half; its shapes are every client's."""
        return self._servers.half

    def states_for_step(
        self, activations: WireArray, positions: AskedPositions
    ) -> tuple[WireArray, Callable[[WireArray, int, bool], Stepped]]:
        """See `HostedHalf`. Other clients may compute until the gradient comes."""
        party: Any = self._servers.in_two_parts(self._client)
        states, finish = party.states_for_step(from_wire(activations), positions)

        def update(gradient: WireArray, step: int, want_gradient: bool) -> Stepped:
            self._servers.of(self._client)
            return stepped(finish(from_wire(gradient), step, want_gradient))

        return to_wire(states), update
