"""A model of which this device holds the first half and a server the rest. No torch: the half runs on its own runtime.

What leaves the device: the hidden state at the cut of every token of the text, and how long the text may get. Tokens
are chosen here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol, runtime_checkable

import numpy as np

from hosl.errors import WireError
from hosl.inference.answering import NextToken
from hosl.inference.decoding import Candidates, most_probable
from hosl.transport.channel import Channel
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import to_enum
from hosl.wire.tensors import Unpacking, WireArray, pack

_LOGITS_BYTES = 64 << 20
"""The largest answer about one token: the logits of sixteen million tokens."""


@runtime_checkable
class DeviceHalf(Protocol):
    """The half of this device, with its head where the labels stay here."""

    def new_text(self) -> Callable[[Sequence[int]], WireArray]:
        """The function from the next token ids of a new text to their hidden state [1, tokens, width]."""
        ...

    def candidates(self, state: WireArray, count: int) -> Candidates:
        """The most probable next tokens after a trunk's state [1, 1, width]; 0: all."""
        ...


class SplitModel:
    """A model across a connection."""

    def __init__(
        self,
        channel: Channel,
        half: DeviceHalf,
        ask: pb.AskGenerate,
        *,
        vocabulary: int | None = None,
        hear: Callable[[pb.GenerateReady, int], None] = lambda ready, step: None,
    ) -> None:
        """Nothing is sent before a text.

        Args:
            channel: to the server.
            half: of this device.
            ask: names model and run; the fields about one text are filled here.
            vocabulary: the rows of the model's table; None: any token of the server's is taken.
            hear: is called with what the server says at the begin of each text, and the step of its weights: then, and
                at the end if they have changed.
        """
        self._channel, self._half, self._ask, self._hear = channel, half, ask, hear
        self._vocabulary = vocabulary
        self.step = 0
        """The step of the server's weights that answered last."""

    @contextmanager
    def text(self, most_tokens: int, candidates: int) -> Iterator[NextToken]:
        """See `hosl.inference.text_model.Model`. The call lasts as long as the context.

        Raises:
            LinkError: if the server goes away. LimitError, BusyError: if it has no room for the text.
            HandshakeError, AccessError: if the halves do not fit, or the run is not this client's.
        """
        frames: SimpleQueue[pb.GenerateRequest | None] = SimpleQueue()
        ask = pb.AskGenerate(most_tokens=most_tokens, candidates=candidates)
        ask.MergeFrom(self._ask)
        frames.put(pb.GenerateRequest(ask=ask))
        parts = self._channel.converse("Generate", iter(frames.get, None), pb.GenerateReply)
        try:
            ready = _part(parts, "ready").ready
            self.step = ready.step
            self._hear(ready, ready.step)
            hidden_of = self._half.new_text()

            def next_token(ids: Sequence[int]) -> Candidates:
                hidden = pack(hidden_of(ids), "none")
                frames.put(pb.GenerateRequest(hidden=hidden.header))
                for chunk in hidden.chunks():
                    frames.put(pb.GenerateRequest(chunk=chunk))
                told = _part(parts, "next").next
                self.step = told.step
                return self._candidates(told, parts, hidden.header, candidates)

            yield next_token
            if self.step != ready.step:
                self._hear(ready, self.step)
        finally:
            frames.put(None)  # in any case: the sending thread must end
            parts.close()

    def _candidates(
        self, told: pb.Next, parts: Iterator[pb.GenerateReply], hidden: pb.Tensor, count: int
    ) -> Candidates:
        """The candidates of an answer, checked.

        Raises:
            WireError: if the answer is not what was asked for.
        """
        if not told.HasField("tensor"):
            tokens, logits = np.array(told.tokens, np.int64), np.array(told.logits, np.float32)
            if not 1 <= len(tokens) == len(logits) <= count or self._ask.model.labels:
                raise WireError(
                    f"asked for {count} candidates, the server sent {len(tokens)} with {len(logits)} logits"
                )
            if not np.isfinite(logits).all() or (np.diff(logits) > 0).any():
                raise WireError("the server's candidates are not ordered by finite logits")
            if self._vocabulary is not None and tokens.max() >= self._vocabulary:
                raise WireError(f"token {tokens.max()} is outside the vocabulary of {self._vocabulary}")
            return Candidates(tokens, logits)
        tensor = _tensor(told.tensor, parts)
        width = hidden.shape[2]
        if self._ask.model.labels == pb.LABELS_AT_CLIENT:
            if tensor.data.shape != (1, 1, width):
                raise WireError(f"a state is [1, 1, {width}], the server sent {list(tensor.data.shape)}")
            return self._half.candidates(tensor, count)
        size = self._vocabulary or tensor.data.shape[2]
        if tensor.data.shape != (1, 1, size) or told.tensor.dtype != to_enum(pb.DType, "float32"):
            raise WireError(
                f"logits are float32 [1, 1, {size}], the server sent {list(tensor.data.shape)} {tensor.dtype}"
            )
        return most_probable(tensor.data[0, 0], count)


def _part(parts: Iterator[pb.GenerateReply], kind: str) -> pb.GenerateReply:
    part = next(parts, None)
    found = None if part is None else part.WhichOneof("part")
    if part is None or found != kind:
        raise WireError(f"the reply to Generate should go on with `{kind}`, got `{found}`")
    return part


def _tensor(header: pb.Tensor, parts: Iterator[pb.GenerateReply]) -> WireArray:
    unpacking = Unpacking(header, tensor_bytes=_LOGITS_BYTES)
    while not unpacking.complete:
        unpacking.add(_part(parts, "chunk").chunk)
    return unpacking.array()
