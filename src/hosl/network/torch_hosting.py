"""A server half on PyTorch for the service: arrays in, arrays out, and checkpoints."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hosl.config import Config
from hosl.core.journal import Journal
from hosl.core.targets import (
    AskedPositions,
    ClassTargets,
    OptionTargets,
    StepReply,
    Targets,
    scored_positions,
)
from hosl.errors import WireError
from hosl.inference.halves import at_the_end, best_of
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.parties.servers.basic import TorchServer
from hosl.parties.servers.synchronous import Contributed
from hosl.parties.servers.trunk import TrunkServer
from hosl.service.hosted_half import Asked, HostedText, NextToken, Stepped, TextSizes
from hosl.split import TrunkHalf
from hosl.split.caches import HalfCache
from hosl.system.checkpoint import (
    Checkpoint,
    checkpoint_path,
    drop_checkpoints_after,
    read_checkpoint,
    write_checkpoint,
)
from hosl.system.model_limits import limits_of
from hosl.training.checkpointing import put_server, restore_server_
from hosl.wire.tensors import WireArray


class TorchHosted:
    """Implements `service.hosted_half.HostedHalf`."""

    def __init__(self, config: Config, open_party: Callable[[], TorchServer | TrunkServer]) -> None:
        """Load the half at its base weights.

        Args:
            config: the settings of the run, from its Hello.
            open_party: makes the server on the half at its base weights.
        """
        self._config, self._open_party = config, open_party
        self._text_sizes: TextSizes | None = None
        self._party: Any = open_party()

    @property
    def party(self) -> Any:
        """The server, to compute with."""
        return self._party

    @property
    def kept(self) -> Any:
        """The server, to be read or written."""
        return self._party

    @property
    def half(self) -> Any:
        """The half, to ask it what it is; in any thread."""
        return self._party.half

    @cached_property
    def _longest(self) -> int | None:
        """The positions that the model reads; read once, as transformers makes a dict of all its settings for it."""
        return limits_of(self.half.config.to_dict()).positions

    def check(self, shape: tuple[int, ...], targets: Targets | AskedPositions) -> int:
        """Refuse activations of the wrong width or length, and targets that the head does not have.

        Returns:
            The bytes that the logits of one activation take; few activations with many scored positions take most.

        Raises:
            WireError: naming both values.
        """
        config: Any = self.half.config
        text = config.get_text_config()
        if shape[2] != text.hidden_size:
            raise WireError(f"activations are {text.hidden_size} wide in this model, got {shape[2]}")
        longest = self._longest
        if longest is not None and shape[1] > longest:
            raise WireError(f"this model reads {longest} positions, got {shape[1]}")
        if isinstance(targets, ClassTargets) and int(targets.labels.max()) >= config.num_labels:
            raise WireError(
                f"label {targets.labels.max()} is outside 0..{config.num_labels - 1} of this model's head"
            )
        if isinstance(targets, OptionTargets) and int(targets.tokens.max()) >= text.vocab_size:
            raise WireError(f"token {targets.tokens.max()} is outside the vocabulary of {text.vocab_size}")
        takes_classes = type(self.half.model).__name__.endswith("ForSequenceClassification")
        if isinstance(targets, ClassTargets | OptionTargets) and (
            isinstance(targets, ClassTargets) != takes_classes
        ):
            raise WireError(
                f"this model's head takes {'classes' if takes_classes else 'option tokens'}, got the other kind"
            )
        if not isinstance(targets, OptionTargets):
            return 0
        scored = max(len(scored_positions(targets)), targets.positions.shape[1])
        return 4 * shape[0] * scored * text.vocab_size

    def losses(self, activations: Sequence[WireArray], targets: Targets) -> list[float]:
        """See `HostedHalf`."""
        return list(self._method("losses")([from_wire(h) for h in activations], targets))

    def losses_together(self, questions: Sequence[Asked]) -> list[list[float]]:
        """See `HostedHalf`."""
        return self._method("losses_together")(
            [([from_wire(h) for h in question.activations], question.targets) for question in questions]
        )

    def scores(self, activations: WireArray, targets: Targets) -> np.ndarray:
        """See `HostedHalf`."""
        return self._method("scores")(from_wire(activations), targets)

    def gradient(self, activations: WireArray, targets: Targets) -> Stepped:
        """See `HostedHalf`."""
        return stepped(self._method("gradient")(from_wire(activations), targets))

    def probe(
        self, pair: Sequence[WireArray], targets: Targets, seed: int, epsilon: float
    ) -> tuple[float, float]:
        """See `HostedHalf`."""
        h_plus, h_minus = (from_wire(h) for h in pair)
        return self._method("probe")((h_plus, h_minus), targets, seed, epsilon)

    def step(self, activations: WireArray, targets: Targets, step: int, want_gradient: bool) -> Stepped:
        """See `HostedHalf`."""
        reply = self._method("step")(from_wire(activations), targets, step=step, want_gradient=want_gradient)
        return stepped(reply)

    def states(self, activations: Sequence[WireArray], positions: AskedPositions) -> list[WireArray]:
        """See `HostedHalf`."""
        return [to_wire(s) for s in self._method("states")([from_wire(h) for h in activations], positions)]

    def states_for_step(
        self, activations: WireArray, positions: AskedPositions
    ) -> tuple[WireArray, Callable[[WireArray, int, bool], Stepped]]:
        """See `HostedHalf`."""
        states, finish = self._method("states_for_step")(from_wire(activations), positions)

        def update(gradient: WireArray, step: int, want_gradient: bool) -> Stepped:
            return stepped(finish(from_wire(gradient), step, want_gradient))

        return to_wire(states), update

    def states_for_part(
        self, activations: WireArray, positions: AskedPositions
    ) -> tuple[WireArray, Callable[[WireArray, int, bool], Stepped]]:
        """See `HostedHalf`."""
        states, finish = self._method("states_for_part")(from_wire(activations), positions)

        def contribute(gradient: WireArray, weight: int, want_gradient: bool) -> Stepped:
            return stepped(finish(from_wire(gradient), weight, want_gradient))

        return to_wire(states), contribute

    def text_sizes(self) -> TextSizes:
        """See `HostedHalf`. The bytes of a token are measured, once: families differ in what they keep.

        Raises:
            WireError: if the model classifies.
        """
        half = self.party.half
        if half.head != "causal":
            raise WireError("this model classifies: it has no text to say")
        if self._text_sizes is None:
            config: Any = half.config
            width = config.get_text_config().hidden_size
            token_bytes = self._token_bytes(torch.zeros(1, 1, width))
            self._text_sizes = TextSizes(width, token_bytes, self._longest)
        return self._text_sizes

    def _token_bytes(self, hidden: torch.Tensor) -> int:
        """The bytes that a token's hidden state [1, 1, width] takes in a text's cache."""
        half = self.party.half
        cache = half.new_cache()
        at_the_end(half, hidden, cache)
        return cache.size_bytes

    def open_text(self, candidates: int) -> HostedText:
        """See `HostedHalf`."""
        return _Text(self, candidates)

    def contribute(
        self, activations: WireArray, targets: Targets, examples: int, want_gradient: bool
    ) -> Stepped:
        """See `HostedHalf`."""
        reply = self._method("contribute")(
            from_wire(activations), targets, examples, want_gradient=want_gradient
        )
        return stepped(reply)

    def contribute_together(self, parts: Sequence[Asked]) -> list[Stepped]:
        """See `HostedHalf`."""
        contributed = [
            Contributed(from_wire(part.activations[0]), part.targets, part.weight, part.want_gradient)
            for part in parts
        ]
        return [stepped(reply) for reply in self._method("contribute_together")(contributed)]

    def apply(self, step: int) -> None:
        """See `HostedHalf`."""
        self._method("apply")(step)

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """See `HostedHalf`."""
        self._method("descend")(step, list(seeds), list(coefficients))

    def save(
        self,
        folder: Path,
        step: int,
        facts: dict[str, object],
        journal: Journal | None,
        beside: Sequence[int],
    ) -> None:
        """See `HostedHalf`."""
        checkpoint = Checkpoint(step=step, state=dict(facts))
        put_server(checkpoint, self.kept)
        checkpoint.journal = journal.to_bytes() if journal is not None else None
        write_checkpoint(folder, checkpoint, beside=beside)

    def restore(self, folder: Path, step: int) -> tuple[dict[str, object], Journal]:
        """See `HostedHalf`.

        Raises:
            CheckpointError: if the checkpoint is missing or damaged.
        """
        checkpoint = read_checkpoint(checkpoint_path(folder, step)) if step else Checkpoint(step=0)
        self._renew()
        if step:
            restore_server_(self.kept, checkpoint)
        drop_checkpoints_after(folder, step)
        return checkpoint.state, Journal.from_bytes(checkpoint.journal or b"")

    def _renew(self) -> None:
        """Go back to the base weights."""
        self._party = None  # release the old half before the new one is loaded
        self._party = self._open_party()

    def _method(self, call: str) -> Any:
        """The party's method of this name; not every server has every call."""
        method = getattr(self.party, call, None)
        if method is None:
            raise WireError(
                f"a server of method {self._config.method} has no call {call}; the two sides disagree"
            )
        return method


class _Text(HostedText):
    """One text in the half that a `TorchHosted` has at the moment of each token."""

    def __init__(self, hosted: TorchHosted, candidates: int) -> None:
        self._hosted, self._candidates = hosted, candidates
        self._cache: HalfCache | None = hosted.party.half.new_cache()

    def go_on(self, hidden: WireArray) -> NextToken:
        """See `HostedText`."""
        half, cache = self._hosted.party.half, self._cache
        assert cache is not None, "a text that was closed does not go on"
        last = at_the_end(half, from_wire(hidden), cache)
        if isinstance(half, TrunkHalf):
            return NextToken(tensor=to_wire(last))
        return next_token(last, self._candidates)

    @property
    def size_bytes(self) -> int:
        """See `HostedText`."""
        return 0 if self._cache is None else self._cache.size_bytes

    def close(self) -> None:
        """See `HostedText`."""
        self._cache = None


def next_token(logits: torch.Tensor, candidates: int) -> NextToken:
    """What logits [1, 1, vocabulary] say about the next token: so many candidates, or with 0 all of them."""
    if not candidates:
        return NextToken(tensor=to_wire(logits.to(torch.float32)))
    best = best_of(logits, candidates)
    return NextToken(tokens=best.tokens.tolist(), logits=best.logits.tolist())


def stepped(reply: StepReply) -> Stepped:
    """A server's reply to a step, as it goes on the wire."""
    gradient = reply.gradient
    assert gradient is None or isinstance(gradient, torch.Tensor), "a torch server replies with tensors"
    return Stepped(reply.loss, None if gradient is None else to_wire(gradient))
