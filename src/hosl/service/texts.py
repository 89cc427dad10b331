"""Generation on the server: one call is one text. Its cache is bounded before it is made, and goes when the call ends.

A text only reads the weights, as they are at each of its tokens; a run that trains meanwhile goes on as without it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hosl.errors import BusyError, LimitError, WireError
from hosl.service.hosted_half import HostedText, NextToken
from hosl.service.incoming import Incoming
from hosl.service.limits import Limits
from hosl.service.runs import ServedRun
from hosl.service.scheduler import CALL_TOKENS, HELLO_TOKENS, Scheduler
from hosl.service.sessions import Sessions
from hosl.service.status import Status
from hosl.system.allocator import trim
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import pack

CANDIDATES = 1024
"""The most candidates of an answer; where more are asked for, the logits of all tokens are sent."""


@dataclass
class Caches:
    """The bytes that the texts under way may take for keys and values. For one thread."""

    limits: Limits
    _bytes: Counter[str] = field(default_factory=Counter)
    """Client -> the bytes that its texts may take."""
    _texts: int = 0

    @contextmanager
    def reserved(self, client: str, tokens: int, token_bytes: int) -> Iterator[None]:
        """The room of one text's cache; the context spans the text.

        Raises:
            LimitError: if the text is longer than its client's limit, at once or beside its others.
            BusyError: if the server has too many texts, or too many bytes of them, at the moment.
        """
        limits, wanted = self.limits, tokens * token_bytes
        if not limits.texts_at_once:
            raise LimitError(
                "this server trains, and generates nothing: it was started with --texts-at-once 0"
            )
        if wanted > limits.cache_bytes:
            raise LimitError(
                f"asked for {tokens:,} tokens of cache, allowed {limits.cache_bytes // token_bytes:,}: a token takes "
                f"{token_bytes:,} bytes here; shorten the prompt or --max-new-tokens, or raise the server's "
                "--cache-limit"
            )
        in_use, everywhere = self._bytes[client], self._bytes.total()
        if in_use + wanted > limits.cache_bytes:
            raise BusyError(
                f"asked for {tokens:,} tokens of cache, allowed {(limits.cache_bytes - in_use) // token_bytes:,} while "
                f"other texts of client {client} are under way; wait for these"
            )
        if everywhere + wanted > limits.cache_total_bytes or self._texts >= limits.texts_at_once:
            raise BusyError(
                f"asked for {tokens:,} tokens of cache, allowed "
                f"{(limits.cache_total_bytes - everywhere) // token_bytes:,} at the moment; {self._texts} of "
                f"{limits.texts_at_once} texts are under way on this server; try again later"
            )
        self._bytes[client] += wanted
        self._texts += 1
        try:
            yield
        finally:
            self._bytes[client] -= wanted
            self._texts -= 1


class Texts:
    """The texts of all clients."""

    def __init__(self, sessions: Sessions, scheduler: Scheduler, status: Status, limits: Limits) -> None:
        self._sessions, self._scheduler, self._status, self._limits = sessions, scheduler, status, limits
        self._caches = Caches(limits)
        self._returning: set[asyncio.Future[Any]] = set()
        """Work that gives memory back; glibc would keep what a text of 4,000 tokens freed, 290 MiB of 715."""

    async def generate(self, client: str, incoming: Incoming) -> AsyncIterator[pb.GenerateReply]:
        """The call Generate: a text that goes on for as long as the client asks for its next token."""
        first = await incoming.message(pb.GenerateRequest)
        if first.WhichOneof("part") != "ask":
            raise WireError(f"this call begins with `ask`, got `{first.WhichOneof('part')}`")
        ask = first.ask

        def find() -> tuple[ServedRun, Any]:
            run = self._sessions.for_use(client, ask)
            return run, run.half.text_sizes()

        (run, sizes), _ = await self._scheduler.run(client, HELLO_TOKENS, find)
        if not 1 <= ask.most_tokens <= (sizes.positions or ask.most_tokens):
            raise WireError(
                f"a text of this model has 1 to {sizes.positions} tokens, asked for {ask.most_tokens}"
            )
        with (
            self._caches.reserved(client, ask.most_tokens, sizes.token_bytes),
            self._sessions.in_use(run),
            self._status.text(client, run) as count,
            self._memory_returned(),
            closing(run.half.open_text(0 if ask.candidates > CANDIDATES else ask.candidates)) as text,
        ):
            yield pb.GenerateReply(ready=pb.GenerateReady(run=run.shown, step=run.server_step))
            seen = 0
            while (part := await incoming.message_or_end(pb.GenerateRequest)) is not None:
                shape = self._checked(part, sizes.width, seen, ask.most_tokens)
                hidden = await incoming.tensor(
                    part.hidden, tensor_bytes=self._limits.tensor_bytes, kind=pb.GenerateRequest
                )
                seen += shape[1]
                work = _answer(run, text, hidden)
                (step, answer), seconds = await self._scheduler.run(client, max(CALL_TOKENS, shape[1]), work)
                self._status.computed(shape[1])
                count(text.size_bytes)
                for reply in _replies(answer, step, seconds):
                    yield reply

    @contextmanager
    def _memory_returned(self) -> Iterator[None]:
        """Give the allocator's free memory back to the system after the context, and after work that it left behind."""
        try:
            yield
        finally:
            returned = asyncio.ensure_future(self._scheduler.run("memory", 0, trim))
            self._returning.add(returned)
            returned.add_done_callback(self._returning.discard)

    def _checked(self, part: pb.GenerateRequest, width: int, seen: int, most_tokens: int) -> tuple[int, ...]:
        """The shape of a hidden state that goes on with a text of `seen` tokens."""
        if part.WhichOneof("part") != "hidden":
            raise WireError(f"a text goes on with `hidden`, got `{part.WhichOneof('part')}`")
        shape = tuple(part.hidden.shape)
        if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != width:
            raise WireError(f"a text goes on with a hidden state [1, tokens, {width}], got {list(shape)}")
        if seen + shape[1] > most_tokens:
            raise WireError(f"the text was to have {most_tokens} tokens at most, it has {seen + shape[1]}")
        return shape


def _answer(run: ServedRun, text: HostedText, hidden: Any) -> Any:
    """The work of one token: the step of the weights, and their answer."""
    return lambda: (run.server_step, text.go_on(hidden))


def _replies(answer: NextToken, step: int, seconds: float) -> Iterator[pb.GenerateReply]:
    if answer.tensor is None:
        said = pb.Next(step=step, server_s=seconds, tokens=answer.tokens, logits=answer.logits)
        yield pb.GenerateReply(next=said)
        return
    packed = pack(answer.tensor, "none")
    yield pb.GenerateReply(next=pb.Next(step=step, server_s=seconds, tensor=packed.header))
    for chunk in packed.chunks():
        yield pb.GenerateReply(chunk=chunk)
