"""The head of a client that keeps its labels, on the inference engine: its loss, its scores and its own training.

The twin of `servers.headed`. Only the states that predict a scored token go through the head (`edge.loss.scored`), so
that logits are as many as there are right tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import ClassTargets, Targets
from hosl.errors import ModelError, NonFiniteError
from hosl.parties.edge.engine import open_graph
from hosl.parties.edge.half import EdgeHalf
from hosl.parties.edge.loss import Scored, class_scores, loss_and_gradient_, loss_of, scored, token_scores
from hosl.parties.edge.optimisers import EdgeOptimiser, check_gradients
from hosl.parties.edge.weights import MappedWeights
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.headed import Headed, Trunk
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.runtime_json import D_STATES, FOLDER, GRADIENT, LOGITS, STATES

TOKENS_AT_ONCE = 256
"""The scored tokens whose logits are held at once; at a vocabulary of 50,000, 49 MiB."""


class EdgeHalfHead:
    """Final norm and head on the inference engine. Its own weights are mapped; a tied one is the client half's."""

    def __init__(self, half: EdgeHalf, *, threads: int = 1) -> None:
        """Open the graphs of the head of a half's folder.

        Raises:
            ModelError: if the half was split for labels at the server, or files are missing or damaged.
        """
        folder = half.folder
        if half.facts.head is None:
            raise ModelError(
                f"{folder} has no graphs of a head: the model was split for labels at the server; `hosl split "
                "--labels-at client --runtime onnx`"
            )
        self.facts, self._half = half.facts.head, half
        self.weights = MappedWeights(folder / "head.safetensors")
        if self.weights.digest() != half_facts(folder, "client").get("head_digest"):
            raise ModelError(
                f"{folder}: the head's tensors do not have the digest of half.json; split the model again"
            )
        self._graph = open_graph(folder / FOLDER / self.facts.file, threads=threads)
        self._gradient_file = folder / FOLDER / self.facts.gradient_file
        self._gradient_graph = None
        self._threads = threads

    def logits(self, states: Float[np.ndarray, "scored one width"]) -> Float[np.ndarray, "scored vocabulary"]:
        """The logits of these states, float32."""
        return self._graph({STATES: states, **self._given()}, [LOGITS])[LOGITS]

    def differentiated(
        self, states: np.ndarray, gradient: np.ndarray, wanted: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The gradient at the states, and those of the wanted weights, from dL/d logits [scored, vocabulary]."""
        if self._gradient_graph is None:
            self._gradient_graph = open_graph(self._gradient_file, threads=self._threads)
        outputs = {name: f"d.{name}" for name in wanted}
        inputs = {STATES: states, GRADIENT: gradient, **self._given()}
        found = self._gradient_graph(inputs, [D_STATES, *outputs.values()])
        return found[D_STATES], {name: found[output] for name, output in outputs.items()}

    def _given(self) -> dict[str, np.ndarray]:
        own = {name: self.weights.array(name) for name in self.facts.weights}
        return own | {place: self._half.array(name) for place, name in self.facts.tied.items()}


class EdgeHeadedServer(Headed):
    """A `FirstOrderServerSide` over a trunk and an `EdgeHalfHead` on this device."""

    def __init__(
        self,
        trunk: Trunk,
        head: EdgeHalfHead,
        trained: Sequence[str],
        *,
        learning_rate: Callable[[int], float],
        optimiser: OptimiserSpec | None = None,
    ) -> None:
        """Train the head's weights of these names, none of them tied to the client half."""
        super().__init__(trunk)
        self.head, self.learning_rate = head, learning_rate
        self.trained = {name: head.weights.trained_(name) for name in trained}
        self.optimiser = EdgeOptimiser(optimiser or OptimiserSpec())
        self._gradients: dict[str, np.ndarray] = {}

    def finite(self, activations: np.ndarray) -> bool:
        """Whether every number is."""
        return bool(np.isfinite(activations).all())

    def head_loss(self, states: np.ndarray, targets: Targets) -> float:
        """The mean loss at these states, nats."""
        of = scored(targets)
        return sum(loss_of(self.head.logits(_at(states, of, some)), of.some(some)) for some in _slices(of))

    def head_scores(self, states: np.ndarray, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """The scores at these states (`edge.loss`)."""
        of = scored(targets)
        if isinstance(targets, ClassTargets):
            return class_scores(self.head.logits(_at(states, of, slice(None))))
        pieces = (self.head.logits(_at(states, of, some)) for some in _slices(of))
        return token_scores(pieces, targets, of)

    def head_gradient(self, states: np.ndarray, targets: Targets, step: int) -> tuple[float, np.ndarray]:
        """The loss of `step`, and its gradient at these states; the head's own gradients wait for `head_update`.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite.
        """
        of = scored(targets)
        loss, at_states = 0.0, np.zeros_like(states)
        sums: dict[str, np.ndarray] = {}
        for some in _slices(of):
            part = _at(states, of, some)
            logits = self.head.logits(part)
            loss += loss_and_gradient_(logits, of.some(some))
            d_part, own = self.head.differentiated(part, logits, list(self.trained))
            at_states[of.rows[some], of.columns[some]] = d_part[:, 0]
            for name, gradient in own.items():
                sums[name] = sums[name] + gradient if name in sums else gradient
        if not np.isfinite(loss):
            raise NonFiniteError(
                f"the training loss of step {step} is {loss}; it must be finite: lower the learning rates"
            )
        check_gradients([at_states, *sums.values()])
        self._gradients = sums  # replaces those of a call whose reply was lost
        return loss, at_states

    def head_update(self, step: int) -> None:
        """One update of the head from the newest `head_gradient`."""
        gradients, self._gradients = self._gradients, {}
        if gradients:
            self.optimiser.step_(self.trained, gradients, self.learning_rate(step))


def _slices(of: Scored) -> Iterator[slice]:
    """The scored tokens in pieces of `TOKENS_AT_ONCE`."""
    for start in range(0, len(of.tokens), TOKENS_AT_ONCE):
        yield slice(start, start + TOKENS_AT_ONCE)


def _at(states: np.ndarray, of: Scored, places: slice) -> np.ndarray:
    """The states of these scored tokens, [scored, 1, width]."""
    return np.ascontiguousarray(states[of.rows[places], of.columns[places]][:, None])
