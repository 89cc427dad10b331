"""A forward-only client whose directions come from the returned gradient, not from a seed.

An output projection is a layer whose output is added to the residual stream: y = W x + b. If the blocks above left the
stream unchanged, the gradient of W would be g^T x: the outer product of the returned gradient g and the input x. So the
direction is u = g^T x (and sum g for b), scaled to unit length. The assumption is then corrected by measurement: two
evaluations give c = dL/du, and the layer moves by -eta c u, where c u is the exact gradient's projection on u. A bad u
makes a small c, never a step uphill. Only the blocks from the lowest guided one on are evaluated again.
Source: methods.md (i).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hosl.core.targets import Batch
from hosl.parties.clients.frozen import FrozenClient, in_one, row_slices
from hosl.parties.engine.block_calls import BlockCall, recorded
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf


class GuidedClient(FrozenClient):
    """A `GuidedClientSide` that trains the output projections of the last blocks and nothing else.

    Memory beside the weights: one block input [rows, seq, width] and a direction for each output projection. No
    autograd.

    Requires: rows and blocks as `RecomputingClient` does.
    """

    def __init__(
        self, half: ClientHalf, *, blocks: int = 1, micro_batch_size: int | None = None, device: str = "cpu"
    ) -> None:
        """Train the output projections of the last `blocks` blocks; `requires_grad` of all weights is set anew.

        Args:
            half: the client half, with float weights.
            blocks: at least 1, at most the half's cut.
            micro_batch_size: the rows that are evaluated at once; None: chosen by memory (`row_slices`), half as many
                where blocks are evaluated again.
            device: a torch device.
        """
        super().__init__(half, micro_batch_size=micro_batch_size, device=device)
        all_blocks: Any = half.model.get_submodule(half.blocks_name)
        assert 1 <= blocks <= len(all_blocks), f"{blocks} guided blocks of {len(all_blocks)}"
        first = len(all_blocks) - blocks
        self._blocks: list[nn.Module] = list(all_blocks)[first:]
        self._projections: dict[str, nn.Module] = {
            f"{half.blocks_name}.{first + i}.{name}": block.get_submodule(name)
            for i, block in enumerate(self._blocks)
            for name in half.output_projections
        }
        half.model.requires_grad_(False)
        for projection in self._projections.values():
            projection.requires_grad_(True)
        self.trained = trained_parameters(half.model)
        self._parts: list[_Part] = []
        """The micro-batches of the last `forward_for_guides`."""
        self._guides: dict[str, _Guide] = {}

    def forward_for_guides(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the input of the lowest guided block stays here until `descend_along`."""
        self._parts, self._guides = [], {}
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._part(rows, ids, mask)) for rows in self._slices(ids)), len(ids))

    def guide(self, gradient: torch.Tensor) -> tuple[str, ...]:
        """Form the directions from dL/dh [rows, seq, width]; returns the projections' names in block order."""
        assert self._parts, "guide needs a forward_for_guides before it"
        gradient = gradient.to(self.device)
        self._guides = {name: _Guide(projection) for name, projection in self._projections.items()}
        with torch.no_grad():
            for rows in self._micro_batches():
                with self._inputs_added(gradient[rows]):
                    self._evaluate_again(rows)
            for guide in self._guides.values():
                guide.normalise_()
        return tuple(self._guides)

    def slope(self, name: str, gradient: torch.Tensor, epsilon: float) -> float:
        """dL/du along the direction u of one projection: <gradient, h+ - h-> / (2 scale). Weights are only read.

        `epsilon` means what it means for random directions: both shift a layer's output by about epsilon |x| per
        feature, and so the scale of u, which has unit length, is epsilon sqrt(out_features).
        """
        guide, gradient = self._guides[name], gradient.to(self.device)
        scale = epsilon * math.sqrt(len(guide.weight))
        total = 0.0
        with torch.no_grad():
            for rows in self._micro_batches():
                h_plus, h_minus = (self._shifted(name, rows, sign * scale) for sign in (+1, -1))
                total += float(((h_plus - h_minus).to(torch.float64) * gradient[rows]).sum())
        return total / (2 * scale)

    def descend_along(self, names: Sequence[str], slopes: Sequence[float], learning_rate: float) -> None:
        """W -= learning_rate slope u for each of these projections; then the directions are released."""
        with torch.no_grad():
            for name, slope in zip(names, slopes, strict=True):
                self._guides[name].move_(self._projections[name], learning_rate * slope)
        self._parts, self._guides = [], {}

    def _part(self, rows: slice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """h of these rows; records the calls of the guided blocks, of which only the first keeps its hidden state."""
        with torch.no_grad(), recorded(self._blocks) as calls:
            h = self.half(ids[rows], mask[rows])
        for call in calls[1:]:
            call.args = (None, *call.args[1:])  # its hidden state is computed again from the first block's
        self._parts.append(_Part(rows, calls))
        return h

    def _micro_batches(self) -> Iterator[slice]:
        """The rows that are evaluated again at once, each slice within one part."""
        for part in self._parts:
            for rows in row_slices(part.calls[0].args[0].shape[:2], 2, self.micro_batch_size):
                yield slice(part.rows.start + rows.start, part.rows.start + rows.stop)

    def _evaluate_again(self, rows: slice) -> torch.Tensor:
        """The hidden state at the cut, by another call of the guided blocks for the rows of a micro-batch."""
        part = next(p for p in self._parts if p.rows.start <= rows.start < p.rows.stop)
        within, total = part.within(rows), len(part.calls[0].args[0])
        hidden = part.calls[0].args[0][within]
        for block, call in zip(self._blocks, part.calls, strict=True):
            args, kwargs = call.of_rows(within, total)
            hidden = call.hidden(block(hidden, *args, **kwargs))
        return hidden

    @contextmanager
    def _inputs_added(self, gradient: torch.Tensor) -> Iterator[None]:
        """Context manager: the input of every output projection is added to its direction."""

        def adding_to(guide: "_Guide") -> Any:
            return lambda projection, args: guide.add_(gradient, args[0])

        hooks = [
            projection.register_forward_pre_hook(adding_to(self._guides[name]))
            for name, projection in self._projections.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _shifted(self, name: str, rows: slice, scale: float) -> torch.Tensor:
        """The hidden state at the cut with one output projection at W + scale u."""
        guide = self._guides[name]

        def shift(projection: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return guide.shifted(output, args[0], scale)

        hook = self._projections[name].register_forward_hook(shift)
        try:
            return self._evaluate_again(rows)
        finally:
            hook.remove()


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch of the last forward pass."""

    rows: slice
    calls: list[BlockCall]
    """The calls of the guided blocks for these rows."""

    def within(self, rows: slice) -> slice:
        """The slice of these rows that has the given rows of the batch."""
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)


class _Guide:
    """u of one projection, weight and bias together of unit length; the weight [out, in] for every kind of layer."""

    def __init__(self, projection: Any) -> None:
        weight = projection.weight
        self._transposed = not isinstance(projection, nn.Linear)  # GPT-2's Conv1D keeps [in, out]
        out, inputs = reversed(weight.shape) if self._transposed else weight.shape
        options: dict[str, Any] = {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        self.weight = torch.zeros(out, inputs, **options)
        self.bias = None if projection.bias is None else torch.zeros(out, **options)

    def add_(self, gradient: torch.Tensor, x: torch.Tensor) -> None:
        """u += g^T x, and sum g for the bias; [rows, seq, out] and [rows, seq, in]."""
        g = gradient.reshape(-1, len(self.weight)).to(self.weight)
        self.weight.addmm_(g.T, x.reshape(len(g), -1).to(self.weight))
        if self.bias is not None:
            self.bias += g.sum(0)

    def normalise_(self) -> None:
        """Scale u to unit length; zeros stay zeros."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        length = math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
        if length > 0:
            for part in parts:
                part /= length

    def shifted(self, output: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
        """The projection's output at W + scale u: output + scale u x, computed in at least float32."""
        shift = torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return shift.mul_(scale).add_(output).to(output.dtype)

    def move_(self, projection: Any, length: float) -> None:
        """W -= length u, in place."""
        pairs = [(projection.weight, self.weight.T if self._transposed else self.weight)]
        if self.bias is not None:
            pairs.append((projection.bias, self.bias))
        for p, u in pairs:
            if p.dtype == u.dtype:
                p.sub_(u, alpha=length)
            else:
                p.copy_(p.to(u.dtype) - length * u)
