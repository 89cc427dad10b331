"""A forward-only client whose directions come from the returned gradient, and their lengths from measured slopes.

Were the residual stream unchanged by the blocks above, the gradient of an output projection y = W x + b would be g^T x:
the outer product of the returned gradient g and the input x. So the direction is u = g^T x (and sum g for b), scaled to
unit length. The assumption is then corrected by measurement: two evaluations give c = dL/du, and the layers move by
-eta c u, where c u is the exact gradient's projection on u. A bad u makes a small c, never a step uphill. Only the
blocks from the lowest trained one on are evaluated again. Source: methods.md (i), (o).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from hosl.parties.clients.output_projections import OutputProjectionClient
from hosl.parties.micro_batches import row_slices
from hosl.split import ClientHalf
from hosl.split.residual_feedback import inputs_read

SlopesOf: TypeAlias = Literal["one", "per-block", "per-layer"]
"""The layers that one slope is measured for, together: all, those of a block, or each by itself."""


class GuidedClient(OutputProjectionClient):
    """A `GuidedClientSide` that trains the output projections of the last blocks and nothing else. No autograd.

    Memory beside the weights: one block input [rows, seq, width] and a direction for each output projection.
    """

    def __init__(
        self,
        half: ClientHalf,
        *,
        blocks: int = 1,
        slopes: SlopesOf = "per-layer",
        decay: float = 1.0,
        micro_batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        """The arguments are those of `OutputProjectionClient`, whose rows are halved where blocks are evaluated again.

        Args:
            half: as there, with float weights.
            blocks: as there.
            slopes: the layers that share a slope; their directions together have unit length.
            decay: the factor of a layer's direction for each block further down, where layers share a slope.
            micro_batch_size: as there.
            device: as there.
        """
        super().__init__(half, blocks=blocks, decay=decay, micro_batch_size=micro_batch_size, device=device)
        self._groups: dict[str, list[str]] = {}
        """The layers that share a slope, by the name of their group."""
        for block, layers in zip(self._block_names, self._of_block, strict=True):
            for name in layers:
                group = {"one": half.blocks_name, "per-block": block, "per-layer": name}[slopes]
                self._groups.setdefault(group, []).append(name)
        self._guides: dict[str, _Guide] = {}

    def guide(self, gradient: torch.Tensor) -> tuple[str, ...]:
        """Form the directions from dL/dh [rows, seq, width]; returns the names of what has a slope, in block order."""
        assert self._parts, "guide needs a forward_keeping_inputs before it"
        gradient = gradient.to(self.device)
        self._guides = {name: _Guide(projection) for name, projection in self._projections.items()}
        with torch.no_grad():
            for rows in self._micro_batches():
                part = gradient[rows]
                with inputs_read(self._projections, lambda name, x, g=part: self._guides[name].add_(g, x)):
                    self._evaluate_again(rows)
            for block, layers in enumerate(self._of_block if self._decay != 1.0 else ()):
                for name in layers:
                    self._guides[name].scale_(self._decayed(block))
            for names in self._groups.values():
                self._to_unit_length_(names)
        return tuple(self._groups)

    def slope(self, name: str, gradient: torch.Tensor, epsilon: float) -> float:
        """dL/du along the direction u of one group: <gradient, h+ - h-> / (2 scale). Weights are only read.

        `epsilon` means what it means for random directions: both shift a layer's output by about epsilon |x| per
        feature, and so the scale of u, which has unit length, is epsilon sqrt(output features of the group).
        """
        group, gradient = self._groups[name], gradient.to(self.device)
        scale = epsilon * math.sqrt(sum(len(self._guides[layer].weight) for layer in group))
        total = 0.0
        with torch.no_grad():
            for rows in self._micro_batches():
                h_plus, h_minus = (self._shifted(group, rows, sign * scale) for sign in (+1, -1))
                total += float(((h_plus - h_minus).to(torch.float64) * gradient[rows]).sum())
        return total / (2 * scale)

    def descend_along(self, names: Sequence[str], slopes: Sequence[float], learning_rate: float) -> None:
        """W -= learning_rate slope u for each of these groups; then the directions are released."""
        with torch.no_grad():
            for name, slope in zip(names, slopes, strict=True):
                for layer in self._groups[name]:
                    self._guides[layer].move_(self._projections[layer], learning_rate * slope)
        self._parts, self._guides = [], {}

    def _to_unit_length_(self, names: Sequence[str]) -> None:
        """Scale the directions of a group to unit length together; zeros stay."""
        length = math.hypot(*(length for name in names for length in self._guides[name].lengths()))
        for name in names if length > 0 else ():
            self._guides[name].divide_(length)

    def _micro_batches(self) -> Iterator[slice]:
        """The rows that are evaluated again at once, each slice within one part."""
        for part in self._parts:
            for rows in row_slices(part.calls[0].args[0].shape[:2], 2, self.micro_batch_size):
                yield slice(part.rows.start + rows.start, part.rows.start + rows.stop)

    def _evaluate_again(self, rows: slice) -> torch.Tensor:
        """The hidden state at the cut, by another call of the trained blocks for the rows of a micro-batch."""
        part = next(p for p in self._parts if p.rows.start <= rows.start < p.rows.stop)
        within, total = part.within(rows), len(part.calls[0].args[0])
        hidden = part.calls[0].args[0][within]
        for block, call in zip(self._blocks, part.calls, strict=True):
            args, kwargs = call.of_rows(within, total)
            hidden = call.hidden(block(hidden, *args, **kwargs))
        return hidden

    def _shifted(self, group: Sequence[str], rows: slice, scale: float) -> torch.Tensor:
        """The hidden state at the cut with these output projections at W + scale u."""
        with ExitStack() as hooks:
            for name in group:
                hooks.enter_context(self._shift(name, scale))
            return self._evaluate_again(rows)

    @contextmanager
    def _shift(self, name: str, scale: float) -> Iterator[None]:
        guide = self._guides[name]

        def shift(projection: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return guide.shifted(output, args[0], scale)

        hook = self._projections[name].register_forward_hook(shift)
        try:
            yield
        finally:
            hook.remove()


class _Guide:
    """u of one output projection; the weight [out, in] for every kind of layer."""

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

    def lengths(self) -> list[float]:
        """The lengths of the weight's and the bias's part."""
        return [float(torch.linalg.vector_norm(part)) for part in self._parts]

    def divide_(self, length: float) -> None:
        """u /= length."""
        for part in self._parts:
            part /= length

    def scale_(self, factor: float) -> None:
        """u *= factor."""
        for part in self._parts:
            part *= factor

    @property
    def _parts(self) -> list[torch.Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

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
