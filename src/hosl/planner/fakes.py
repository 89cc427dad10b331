"""Fakes of a client's scratch, layers, updates and server, for a step without data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hosl.config import Config
from hosl.core.directions import Drawn
from hosl.core.targets import AskedPositions, StepReply, Targets, states_shape
from hosl.methods.synthetic import NoServer
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.perturbation import Probe, Scratch
from hosl.parties.metered import payload_bytes
from hosl.planner.model_shape import ModelShape
from hosl.split.quantised import Int8Linear, tile_rows
from hosl.wire.tensors import packed_bytes


@dataclass(frozen=True)
class Traffic:
    """The traffic of one step."""

    bytes_up: int
    bytes_down: int
    round_trips: int
    """Requests whose reply the client waits for."""


class Unformed(Scratch):
    """Scratch of the right size without content: a layer is one tile, whose rows share their memory."""

    def __init__(self, sizes: list[int]) -> None:
        """`sizes` gets the elements of every tile that is formed."""
        super().__init__()
        self._sizes = sizes

    def rows_at_once(self, features: int, width: int) -> int:
        """All rows of a layer."""
        return features

    def drawn(self, weight: torch.Tensor, name: str, probe: Probe, span: tuple[int, int]) -> Drawn:
        """A direction of one element: nobody reads it."""
        return super().drawn(weight, name, probe, (0, 1))

    def answering(self, table: torch.Tensor) -> torch.Tensor:
        """The table itself: without data it has a class already, and `dry_run` handles its lookups."""
        return table

    def tiles(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tiles as large in memory as those of `Scratch`."""
        if len(weights) > 1 or weights[0].dim() != 2:
            return super().tiles(weights)
        (weight,) = weights
        rows = min(super().rows_at_once(*weight.shape), len(weight))
        (part,) = super().tiles([weight[:rows]])
        return [part[:1].expand(len(weight), -1)]

    def form_(self, tile: torch.Tensor, weight: torch.Tensor, u: Any, sign: int, start: int = 0) -> None:
        """Count the elements; nothing is computed."""
        self._sizes.append(tile.numel())


class InOnePart(Int8Linear):
    """A layer that computes with one tile whose rows share their memory, instead of hundreds of tiles; no gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """A forward pass with the size and the work of `Int8Linear`."""
        rows = input.reshape(-1, self.in_features)
        out = rows.new_empty(len(rows), self.out_features)
        tile = rows.new_empty(min(tile_rows(self.in_features), self.out_features), self.in_features)
        torch.mm(rows, tile[:1].expand(self.out_features, -1).T, out=out)
        out.mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.view(*input.shape[:-1], self.out_features)


def without_updates(client: FrozenClient) -> FrozenClient:
    """The client, whose updates along random directions do nothing: numpy would draw them, and torch takes no part."""
    if isinstance(client, ZerothOrderClient):
        client.descend = lambda *args, **kwargs: None
    return client


class CountingServer(NoServer):
    """A server that replies at once and counts the traffic."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Set all counts to 0."""
        self.uploads = self.gradients = self.questions = self.small_up = self.small_down = 0

    def losses(self, activations: Sequence[Any], targets: Targets) -> list[float]:
        """See `NoServer`."""
        self._count_request(len(activations), targets)
        self.small_down += 4 * len(activations)
        return super().losses(activations, targets)

    def step(
        self, activations: Any, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """See `NoServer`."""
        self._count_request(1, targets)
        self.gradients += want_gradient
        self.small_down += 4
        return super().step(activations, targets, step=step, want_gradient=want_gradient)

    def probe(self, pair: Any, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """See `NoServer`."""
        self._count_request(2, targets)
        self.small_down += 8
        return super().probe(pair, targets, seed, epsilon)

    def states(
        self, activations: Sequence[Any], targets: AskedPositions, *, at_rest: bool = False
    ) -> list[Any]:
        """Synthetic states, as a trunk's."""
        self._count_request(len(activations), targets)
        states = [h.new_full(states_shape(targets, h.shape[-1]), 0.1) for h in activations]
        self.small_down += payload_bytes(states)
        return states

    def step_states(
        self,
        activations: Any,
        targets: AskedPositions,
        answer: Callable[[Any], Any],
        *,
        step: int,
        want_gradient: bool,
    ) -> StepReply:
        """Synthetic states down, their gradient up; a reply as a trunk's."""
        self._count_request(1, targets)
        states = activations.new_full(states_shape(targets, activations.shape[-1]), 0.1)
        self.small_down += payload_bytes(states)
        self.small_up += payload_bytes(answer(states))
        self.gradients += want_gradient
        return StepReply(0.0, activations * 1e-3 if want_gradient else None)

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """See `NoServer`."""
        self.questions += 1
        self.small_up += 12 * len(seeds)

    def traffic(self, config: Config, shape: ModelShape, rows: int, tokens: int) -> Traffic:
        """The traffic counted so far; `rows` and `tokens` are those of the batch."""
        size, dtype = (rows, tokens, shape.width), config.model.dtype
        up = self.uploads * packed_bytes(size, dtype, config.wire.compression)
        down = self.gradients * packed_bytes(size, dtype, "none")
        return Traffic(up + self.small_up, down + self.small_down, self.questions)

    def _count_request(self, uploads: int, targets: Targets | AskedPositions) -> None:
        self.uploads += uploads
        self.questions += 1
        self.small_up += payload_bytes(targets)
