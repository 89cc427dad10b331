"""What takes the place of a client's scratch, layers, updates and server when a step runs without data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hosl.config import Config
from hosl.core.directions import Drawn
from hosl.core.targets import StepReply, Targets
from hosl.methods.synthetic import NoServer
from hosl.parties.engine.perturbation import Probe, Scratch
from hosl.parties.metered import payload_bytes
from hosl.planner.model_shape import ModelShape
from hosl.split.quantised import Int8Linear, tile_rows
from hosl.wire.tensors import packed_bytes


@dataclass(frozen=True)
class Traffic:
    """What crosses in one step."""

    bytes_up: int
    bytes_down: int
    round_trips: int
    """Questions whose answer the client waits for."""


class Unformed(Scratch):
    """Scratch of the right size without content: a layer is taken in one part, whose rows lie over each other."""

    elements = 0.0
    """Formed so far, by all of a step's probes."""

    def emptied(self) -> "Unformed":
        """Itself, as a new context finds it: without memory."""
        self.__init__()
        return self

    def rows_at_once(self, features: int, width: int) -> int:
        """All."""
        return features

    def drawn(self, weight: torch.Tensor, name: str, probe: Probe, span: tuple[int, int]) -> Drawn:
        """Of one element: nobody reads it."""
        return super().drawn(weight, name, probe, (0, 1))

    def answering(self, table: torch.Tensor) -> torch.Tensor:
        """Itself: without data it has a class already, and lookups are seen to elsewhere (`dry_run`)."""
        return table

    def tiles(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As large in memory as the real ones; see `Scratch`."""
        if len(weights) > 1 or weights[0].dim() != 2:
            return super().tiles(weights)
        (weight,) = weights
        rows = min(super().rows_at_once(*weight.shape), len(weight))
        (part,) = super().tiles([weight[:rows]])
        return [part[:1].expand(len(weight), -1)]

    def form_(self, tile: torch.Tensor, weight: torch.Tensor, u: Any, sign: int, start: int = 0) -> None:
        """Counts."""
        self.elements += tile.numel()


class InOnePart(Int8Linear):
    """A layer whose tiles, hundreds in a large one, are taken as one that lies over itself; no gradient."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `Int8Linear`, in size and work."""
        rows = input.reshape(-1, self.in_features)
        out = rows.new_empty(len(rows), self.out_features)
        tile = rows.new_empty(min(tile_rows(self.in_features), self.out_features), self.in_features)
        torch.mm(rows, tile[:1].expand(self.out_features, -1).T, out=out)
        out.mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.view(*input.shape[:-1], self.out_features)


class Still:
    """A client that is not moved along random directions: numpy would draw them all, and torch's memory has no part."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, call: str) -> Any:
        return getattr(self._client, call)

    def descend(self, *args: Any, **kwargs: Any) -> None:
        """Left out."""


class CountingServer(NoServer):
    """Answers at once, and notes what crossed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again."""
        self.uploads = self.gradients = self.questions = self.small_up = self.small_down = 0

    def losses(self, activations: Sequence[Any], targets: Targets) -> list[float]:
        """See `NoServer`."""
        self._asked(len(activations), targets)
        self.small_down += 4 * len(activations)
        return super().losses(activations, targets)

    def step(
        self, activations: Any, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """See `NoServer`."""
        self._asked(1, targets)
        self.gradients += want_gradient
        self.small_down += 4
        return super().step(activations, targets, step=step, want_gradient=want_gradient)

    def step_at_mean(self, activations: Sequence[Any], targets: Targets, *, step: int) -> list[float]:
        """See `NoServer`."""
        self._asked(len(activations), targets)
        self.small_down += 4 * len(activations)
        return super().step_at_mean(activations, targets, step=step)

    def probe(self, pair: Any, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """See `NoServer`."""
        self._asked(2, targets)
        self.small_down += 8
        return super().probe(pair, targets, seed, epsilon)

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """See `NoServer`."""
        self.questions += 1
        self.small_up += 12 * len(seeds)

    def traffic(self, config: Config, shape: ModelShape, rows: int, tokens: int) -> Traffic:
        """In bytes, of what has been counted."""
        size, dtype = (rows, tokens, shape.width), config.model.dtype
        up = self.uploads * packed_bytes(size, dtype, config.wire.compression)
        down = self.gradients * packed_bytes(size, dtype, "none")
        return Traffic(up + self.small_up, down + self.small_down, self.questions)

    def _asked(self, uploads: int, targets: Targets) -> None:
        self.uploads += uploads
        self.questions += 1
        self.small_up += payload_bytes(targets)
