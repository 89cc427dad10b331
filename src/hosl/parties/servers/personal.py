"""The servers of several clients over one frozen base: adapters, head and optimiser state are each client's own.

What one client's server computes does not depend on the others. A party of a client is an ordinary server whose trained
weights are put into the one half before it computes; several clients' steps are made in one pass (`steps`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hosl.core.targets import StepReply, Targets
from hosl.errors import HoslError, NonFiniteError, SessionError
from hosl.parties.engine.merging import Part, groups, merged_losses
from hosl.parties.engine.optimisers import optimiser_step
from hosl.parties.engine.own_weights import Weights, own_weights
from hosl.parties.engine.perturbation import trained_parameters
from hosl.parties.servers.basic import FirstOrderServer, check_loss
from hosl.parties.servers.trunk import TrunkServer
from hosl.split import ServerHalf, TrunkHalf

Party = FirstOrderServer | TrunkServer


@dataclass(frozen=True, slots=True, eq=False)
class AskedStep:
    """A training step that one client asks for; see `FirstOrderServer.step`."""

    client: str
    activations: torch.Tensor
    targets: Targets
    step: int
    want_gradient: bool = False


class PersonalServers:
    """The servers of several clients that share a half's frozen weights. Not for several threads at once."""

    def __init__(
        self,
        half: ServerHalf | TrunkHalf,
        make_party: Callable[[ServerHalf | TrunkHalf], Party],
        *,
        slots: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Take over a half whose trained weights are chosen: those that each client gets a copy of.

        Args:
            half: the half at the weights that every client begins with.
            make_party: makes the server of one client on the half as it is.
            slots: the clients whose weights and optimiser state are on the device at once; those used least lately wait
                in the memory of the host. None: all are on the device.
            device: a torch device.
        """
        half.to(torch.device(device))
        self.half, self._make_party, self._device = half, make_party, torch.device(device)
        self.slots = slots
        first = trained_parameters(half.model)
        self._first = {name: p.detach().to("cpu", copy=True) for name, p in first.items()}
        self._parties: dict[str, Party] = {}
        self.in_slots: OrderedDict[str, None] = OrderedDict()
        """The clients whose weights are on the device, the one used least lately first."""

    def begin(self, client: str) -> Party:
        """A client's server with new weights and a new optimiser, as at the first step, in place of its old one."""
        self.forget(client)
        self._make_room()
        self._mount({name: nn.Parameter(p.to(self._device, copy=True)) for name, p in self._first.items()})
        party = self._parties[client] = self._make_party(self.half)
        self.in_slots[client] = None
        return party

    def forget(self, client: str) -> None:
        """Let go of a client's weights and optimiser."""
        self._parties.pop(client, None)
        self.in_slots.pop(client, None)

    def kept(self, client: str) -> Party:
        """A client's server wherever its weights are: to be read or written, not to compute with."""
        return self._parties[client]

    def of(self, client: str) -> Party:
        """A client's server, with its weights on the device and in the half, until another client's is asked for."""
        party = self._in_slot(client)
        self._mount(party.trained)
        return party

    def in_two_parts(self, client: str) -> Party:
        """As `of`, for a step whose gradient comes later: of all clients' graphs one is kept at most, the newest."""
        for party in self._parties.values():
            party.forget()
        return self.of(client)

    def steps(self, asked: Sequence[AskedStep]) -> list[StepReply | HoslError]:
        """A training step of each of several clients in few passes over the base; the reply or the error of each.

        The loss of each is the mean over its own rows, and its gradients are of that loss alone. A client whose loss or
        gradient is not finite gets NonFiniteError and keeps its weights; the others' steps count.

        Requires: no client twice, at most as many clients as slots; labels at the server.
        """
        if len(asked) == 1:
            return [_stepped_alone(self.of(asked[0].client), asked[0])]
        parties = [self._in_slot(one.client) for one in asked]
        leaves = [q.activations.detach().to(self._device).requires_grad_(q.want_gradient) for q in asked]
        batches = [Part(h, one.targets) for h, one in zip(leaves, asked, strict=True)]
        losses = self._losses([party.trained for party in parties], batches)
        finite = [loss for loss in losses if torch.isfinite(loss.detach())]
        try:
            if finite:
                torch.stack(finite).sum().backward()
        except BaseException:  # such as a full device: what was added so far must not count in the next step
            for p in (p for party in parties for p in party.trained.values()):
                p.grad = None
            raise
        return [
            _updated(party, one.step, float(loss.detach()), h)
            for one, party, loss, h in zip(asked, parties, losses, leaves, strict=True)
        ]

    def losses(self, asked: Sequence[tuple[str, Sequence[torch.Tensor], Targets]]) -> list[list[float]]:
        """The mean losses, nats, of several clients' activations in few passes: `losses` of each client's server.

        Requires: as `steps`, but a client may ask twice.
        """
        if len(asked) == 1:
            party = self.of(asked[0][0])
            assert isinstance(party, FirstOrderServer), "labels at the client: the server has no losses"
            return [party.losses(*asked[0][1:])]
        weights = [self._in_slot(client).trained for client, hs, _ in asked for _ in hs]
        batches = [Part(h.to(self._device), targets) for _, hs, targets in asked for h in hs]
        with torch.no_grad():
            found = iter(self._losses(weights, batches))
            return [[float(next(found)) for _ in hs] for _, hs, _ in asked]

    def _losses(self, weights: Sequence[Weights], parts: Sequence[Part]) -> list[torch.Tensor]:
        """The mean loss of each batch at weights of its own, in as few passes as lengths and dtypes allow."""
        half: Any = self.half
        losses: dict[int, torch.Tensor] = {}
        for group in groups(parts):
            batches = [parts[index] for index in group]
            rows = [len(h) for h, _ in batches]
            with own_weights(half.model, [weights[index] for index in group], rows):
                losses |= dict(zip(group, merged_losses(half, batches), strict=True))
        return [losses[index] for index in range(len(parts))]

    def _in_slot(self, client: str) -> Party:
        if client not in self._parties:
            raise SessionError(f"the adapters of client {client} are not in memory any more; say hello again")
        party = self._parties[client]
        if client not in self.in_slots:
            self._make_room()
            _move_(party, self._device)
        self.in_slots[client] = None
        self.in_slots.move_to_end(client)
        return party

    def _make_room(self) -> None:
        """Move the clients used least lately to the host until one more has a slot."""
        while self.slots is not None and len(self.in_slots) >= self.slots:
            client, _ = self.in_slots.popitem(last=False)
            _move_(self._parties[client], torch.device("cpu"))

    def _mount(self, weights: dict[str, nn.Parameter]) -> None:
        """Put trained weights into the half."""
        for name, p in weights.items():
            module, _, key = name.rpartition(".")
            self.half.model.get_submodule(module)._parameters[key] = p


def _updated(party: Party, step: int, loss: float, h: torch.Tensor) -> StepReply | HoslError:
    assert party.optimiser is not None, "a half without trained weights has no step of its own"
    try:
        check_loss(loss, step)
        optimiser_step(party.optimiser, party.learning_rate(step))
    except NonFiniteError as error:
        return error
    finally:
        party.optimiser.zero_grad()
    return StepReply(loss=loss, gradient=h.grad)


def _stepped_alone(party: Party, one: AskedStep) -> StepReply | HoslError:
    assert isinstance(party, FirstOrderServer), "labels at the client: a step comes in two parts"
    try:
        return party.step(one.activations, one.targets, step=one.step, want_gradient=one.want_gradient)
    except NonFiniteError as error:
        return error
    finally:
        party.forget()  # who asks again is answered by the service


def _move_(party: Party, device: torch.device) -> None:
    """Move a server's weights and optimiser state to a device, in place; what a repeated call needs is let go."""
    party.forget()
    for p in party.trained.values():
        p.data = p.data.to(device)
    for state in party.optimiser.state.values() if party.optimiser is not None else ():
        for entry, value in state.items():
            if entry != "step":  # torch keeps the count of steps on the CPU
                state[entry] = value.to(device)
