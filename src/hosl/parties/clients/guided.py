"""A forward-only client whose directions come from the returned gradient, where random ones would come from a seed.

An output projection is a layer whose output is added to the residual stream: y = W x + b. Were the stream handed on
unchanged from there to the cut, the gradient of W would be g^T x, the outer product of the returned gradient and what
the layer read. So u = g^T x (and sum g for b), scaled to unit length, is the direction; what the assumption left out
is measured: c = dL/du by two evaluations, and the projection moves by -eta c u, the exact gradient's projection on u.
A bad u makes a small c, never a step uphill. Only the blocks from the lowest guided one on are evaluated again.
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
    """Implements `GuidedClientSide`; trains the output projections of the last blocks and nothing else.

    Holds, beside the weights, one block input [rows, seq, width] and a direction for each output projection. No
    autograd.

    Requires: what `RecomputingClient` requires of rows and blocks.
    """

    def __init__(
        self, half: ClientHalf, *, blocks: int = 1, micro_batch_size: int | None = None, device: str = "cpu"
    ) -> None:
        """Train the output projections of the last `blocks` blocks, whatever required a gradient before.

        Args:
            half: the client's; float weights.
            blocks: at least 1, at most the half's cut.
            micro_batch_size: how many rows are evaluated at once; None: as many as memory suggests, when blocks are
                evaluated again half as many (`row_slices`).
            device: a torch device.
        """
        super().__init__(half, micro_batch_size=micro_batch_size, device=device)
        every: Any = half.model.get_submodule(half.blocks_name)
        assert 1 <= blocks <= len(every), f"{blocks} guided blocks of {len(every)}"
        first = len(every) - blocks
        self._blocks: list[nn.Module] = list(every)[first:]
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
        """Of the last `forward_for_guides`."""
        self._guides: dict[str, _Guide] = {}

    def forward_for_guides(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the input of the lowest guided block stays here until `descend_along`."""
        self._parts, self._guides = [], {}
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._part(rows, ids, mask)) for rows in self._slices(ids)), len(ids))

    def guide(self, gradient: torch.Tensor) -> tuple[str, ...]:
        """Form every projection's direction from dL/dh [rows, seq, width]; their names, in the order of the blocks."""
        assert self._parts, "guide needs a forward_for_guides before it"
        gradient = gradient.to(self.device)
        self._guides = {name: _Guide(projection) for name, projection in self._projections.items()}
        with torch.no_grad():
            for rows in self._micro_batches():
                with self._reading(gradient[rows]):
                    self._again(rows)
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
        """W -= learning_rate slope u for each of these projections; then the directions are let go."""
        with torch.no_grad():
            for name, slope in zip(names, slopes, strict=True):
                self._guides[name].move_(self._projections[name], learning_rate * slope)
        self._parts, self._guides = [], {}

    def _part(self, rows: slice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """h of these rows, and what the guided blocks were called with; only the first keeps its hidden state."""
        with torch.no_grad(), recorded(self._blocks) as calls:
            h = self.half(ids[rows], mask[rows])
        for call in calls[1:]:
            call.args = (None, *call.args[1:])  # is computed again from the first one's
        self._parts.append(_Part(rows, calls))
        return h

    def _micro_batches(self) -> Iterator[slice]:
        """Rows that are evaluated again at once; none of them in two parts."""
        for part in self._parts:
            for rows in row_slices(part.calls[0].args[0].shape[:2], 2, self.micro_batch_size):
                yield slice(part.rows.start + rows.start, part.rows.start + rows.stop)

    def _again(self, rows: slice) -> torch.Tensor:
        """The guided blocks, for the rows of a micro-batch: the hidden state at the cut."""
        part = next(p for p in self._parts if p.rows.start <= rows.start < p.rows.stop)
        within, total = part.within(rows), len(part.calls[0].args[0])
        hidden = part.calls[0].args[0][within]
        for block, call in zip(self._blocks, part.calls, strict=True):
            args, kwargs = call.of_rows(within, total)
            hidden = block(hidden, *args, **kwargs)
        return hidden

    @contextmanager
    def _reading(self, gradient: torch.Tensor) -> Iterator[None]:
        """Within this context, what an output projection reads is added to its direction."""

        def read_by(guide: "_Guide") -> Any:
            return lambda projection, args: guide.add_(gradient, args[0])

        hooks = [
            w.register_forward_pre_hook(read_by(self._guides[name])) for name, w in self._projections.items()
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
            return self._again(rows)
        finally:
            hook.remove()


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of the batch that went forward together."""

    rows: slice
    calls: list[BlockCall]
    """Of the guided blocks, for these rows."""

    def within(self, rows: slice) -> slice:
        """Where rows of the batch stand among these."""
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
        """To unit length; a gradient of zeros leaves zeros."""
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
