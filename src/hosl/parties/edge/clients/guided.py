"""A client on the engine that learns by residual feedback with measured slopes; the twin of `GuidedClient`.

Directions are the gradients of residual feedback, scaled to unit length; two evaluations measure the slope along each.
Why, and what it costs: `hosl.parties.clients.guided`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Batch
from hosl.errors import ConfigError
from hosl.parties.edge.clients.residual import ResidualEdgeClient
from hosl.parties.edge.gradients import Kept
from hosl.parties.edge.half import EdgeHalf


class GuidedEdgeClient(ResidualEdgeClient):
    """A `GuidedClientSide` that trains the output projections of the last blocks, by one slope or one for each block.

    Memory beside the weights: one block input [rows, seq, width], the directions, and the moved weights of a block.
    """

    def __init__(
        self,
        half: EdgeHalf,
        trained: Sequence[str],
        *,
        slopes: Literal["one", "per-block"],
        decay: float = 1.0,
        micro_batch_size: int | None = None,
    ) -> None:
        """Train output projections of the last blocks.

        Args:
            half: the client half.
            trained: the parameters by their names in the half.
            slopes: the layers that share a slope; their directions together have unit length.
            decay: the factor of a layer's direction for each block further down.
            micro_batch_size: as in `ResidualEdgeClient`.

        Raises:
            ConfigError: if norms stand between these layers and the residual stream.
        """
        if half.norms_above:
            raise ConfigError(
                f"residual.slopes: {slopes} measures steps along g^T x, which a model with norms between its layers "
                "and the residual stream does not have; leave it out"
            )
        super().__init__(half, trained, decay=decay, kept="stream", micro_batch_size=micro_batch_size)
        self._groups: dict[str, list[str]] = {}
        """The parameters that share a slope, by the name of their group."""
        for index, names in enumerate(self._of_block):
            prefix = half.facts.blocks[index].prefix
            group = prefix if slopes == "per-block" else prefix.rpartition(".")[0]
            self._groups.setdefault(group, []).extend(names)
        self._groups = {group: names for group, names in self._groups.items() if names}
        self._guides: dict[str, np.ndarray] = {}
        """By parameter, its direction u."""
        self._start: tuple[Kept, np.ndarray] | None = None
        """The micro-batches, and the input of the lowest trained block."""

    def forward_keeping_inputs(self, batch: Batch) -> Float[np.ndarray, "rows seq width"]:
        """h; the input of the lowest trained block stays here until `descend_along`."""
        h = super().forward_keeping_inputs(batch)
        assert self._kept is not None
        self._start, self._guides = (self._kept, self._kept.inputs[0]), {}
        return h

    def guide(self, gradient: Float[np.ndarray, "rows seq width"]) -> tuple[str, ...]:
        """Form the directions from dL/dh; returns the names of what has a slope, in block order."""
        for index, sums in self._gradients(gradient):
            factor = np.float32(self._decay ** (self.half.cut - 1 - index))
            self._guides |= {name: total * factor if factor != 1 else total for name, total in sums.items()}
        for names in self._groups.values():
            length = math.hypot(*(float(np.linalg.norm(self._guides[name])) for name in names))
            for name in names if length > 0 else ():
                self._guides[name] /= np.float32(length)
        return tuple(self._groups)

    def slope(self, name: str, gradient: Float[np.ndarray, "rows seq width"], epsilon: float) -> float:
        """dL/du along one group's direction: <gradient, h+ - h-> / (2 scale). Weights are only read.

        The scale is epsilon sqrt(output features of the group), as `GuidedClient.slope` explains.
        """
        layers = {parameter.rpartition(".")[0] for parameter in self._groups[name]}
        scale = epsilon * math.sqrt(len(layers) * self.half.facts.width)
        h_plus, h_minus = (self._shifted(set(self._groups[name]), sign * scale) for sign in (+1, -1))
        return float(((h_plus - h_minus) * gradient).sum(dtype=np.float64)) / (2 * scale)

    def descend_along(self, names: Sequence[str], slopes: Sequence[float], learning_rate: float) -> None:
        """W -= learning_rate slope u for each of these groups; then the directions are released."""
        for name, slope in zip(names, slopes, strict=True):
            for parameter in self._groups[name]:
                move = self._guides.pop(parameter).reshape(self.trained[parameter].shape)
                move *= np.float32(learning_rate * slope)
                self.trained[parameter] -= move
        self._start, self._guides = None, {}

    def _shifted(self, group: set[str], scale: float) -> np.ndarray:
        """The hidden state at the cut with these parameters at W + scale u."""
        assert self._start is not None, "a slope needs a forward_keeping_inputs and a guide before it"
        kept, hidden = self._start
        for index in range(self._lowest, self.half.cut):
            weights = self.half.block_weights(index)
            for place in list(weights):
                if (name := self.half.parameter(index, place)) in group:
                    u = self._guides[name].reshape(weights[place].shape)
                    weights[place] = weights[place] + np.float32(scale) * u
            hidden = self._through_block(index, hidden, kept.slices, kept.extras, weights)
            self.half.release(index)
        return hidden
