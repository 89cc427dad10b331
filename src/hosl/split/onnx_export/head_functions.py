"""The head of a client that keeps its labels as a function of states and weights; its gradient, too.

Which weights it takes from its own file, and which from the client half, to which they are tied: `HeadGraph`.
"""

from typing import Any

import torch

from hosl.split.onnx_export.tracing import Sizes, Tensors, differentiated, given
from hosl.split.reading.runtime_json import LOGITS, STATES
from hosl.split.u_shape import HeadHalf


class HeadFunction:
    """Final norm and head, or pooler and classifier, over the states of scored tokens."""

    def __init__(self, head: HeadHalf, tied: dict[str, str]) -> None:
        """`tied`: by name in the head, the client half's parameter that it shares; it has no gradient here."""
        self._head, self.tied = head, tied
        self._model: Any = head.model
        self.weights = tuple(name for name, _ in head.named_parameters())
        """The names of all weights."""

    def examples(self, sizes: Sizes, width: int) -> Tensors:
        """Tensors of every input of `forward`, of these sizes; the values do not matter."""
        found = {STATES: torch.zeros(sizes.seq, 1, width)}
        return found | {name: torch.zeros(p.shape) for name, p in self._head.named_parameters()}

    def forward(self, tensors: Tensors) -> Tensors:
        """`logits` [scored, vocabulary or classes] of `states` [scored, 1, width]."""
        with given(self._model, {name: tensors[name] for name in self.weights}):
            return {LOGITS: self._logits(tensors[STATES])}

    def gradient(self, tensors: Tensors) -> Tensors:
        """`d.states`, and `d.NAME` for every weight that is not tied, from `gradient` = dL/d logits."""
        own = tuple(name for name in self.weights if name not in self.tied)
        return differentiated(self.forward, LOGITS, (STATES, *own), tensors)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._head.logits(states)
        return logits.reshape(logits.shape[0], -1)
