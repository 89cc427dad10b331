"""Fair scheduling: one piece of compute at a time, for the waiting client that has been served fewest tokens.

Questions of one kind that wait can be answered together (`run_merged`). The turn is still that of one question, the
one due; others ride along with it. No client starves by that: the order of turns stays, a rider pays for its tokens as
if it had waited, and a pass with riders has `merge_tokens` tokens at most. So whoever waits has no more turns before
its own than without merging, each of them a pass of that length at most.
"""

import asyncio
import heapq
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

_Result = TypeVar("_Result")
_Question = TypeVar("_Question")
CALL_TOKENS = 64
"""The tokens that a call costs at least, however little it carries: about a pass over the weights without tokens."""
HELLO_TOKENS = 4096
"""The tokens of a hello or a save: weights are read or written."""
_KEPT = 1024
"""More clients than these: those whose served tokens are not above the level are forgotten, which changes no turn."""


@dataclass(order=True, slots=True)
class _Waiting:
    """One question that waits for its turn, or work that is asked nothing."""

    served: int
    """The tokens that its client had been served when it came."""
    number: int
    """How many came before it."""
    client: str = field(compare=False)
    tokens: int = field(compare=False)
    question: Any = field(compare=False)
    answer: Callable[[Sequence[Any]], Sequence[Any]] = field(compare=False)
    kind: Hashable = field(compare=False)
    """Of which others may be answered with it; None: it is answered alone."""
    holds_back: Collection[Hashable] = field(compare=False)
    answered: asyncio.Future[tuple[Any, float]] = field(compare=False)
    """The answer and the seconds; is cancelled when the asker goes away."""
    asked_s: float = field(compare=False)
    """When it came, by `time.perf_counter`."""
    spent_s: tuple[float, float] | None = field(default=None, compare=False)
    """The seconds that it waited for its turn, and its share of the pass; None: it was not answered."""


class _Answer(NamedTuple):
    result: Any
    error: BaseException | None


class Scheduler:
    """Fair queueing over clients, weighed by tokens (rows x positions). One thread computes; for one event loop.

    A client that was away does not save up turns: it starts at the level of the one served least among the waiting.
    """

    def __init__(
        self,
        merge_tokens: int = 0,
        *,
        tell: Callable[[int], None] = lambda questions: None,
        worked: Callable[[str, float, float], None] = lambda client, wait_s, took_s: None,
    ) -> None:
        """Nothing waits yet.

        Args:
            merge_tokens: the tokens of questions that are answered together, at most; 0: each is answered alone.
            tell: is called with the number of questions of each pass that could have been of several.
            worked: is called in the asker's task after each piece of work: the client, the seconds that it waited for
                its turn, and those that it took.
        """
        self._worked = worked
        self.merge_tokens = merge_tokens
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hosl-compute")
        self._waiting: list[_Waiting] = []
        self._served: dict[str, int] = {}
        self._most_served = _KEPT
        self._level = 0
        self._count = 0
        self._busy = False
        """Whether the compute thread looks for work."""
        self._lock = threading.Lock()

    @property
    def queue(self) -> int:
        """The number of pieces of work that wait."""
        return sum(1 for waiting in self._waiting if not waiting.answered.done())

    async def run(
        self,
        client: str,
        tokens: int,
        work: Callable[[], _Result],
        *,
        holds_back: Collection[Hashable] = (),
    ) -> tuple[_Result, float]:
        """Run `work` in the compute thread when it is `client`'s turn; returns its result and its seconds.

        A caller that goes away after its turn has come does not stop the work: what it changes, it changes whole.

        Args:
            client: who pays.
            tokens: what the work costs.
            work: the work.
            holds_back: the kinds of questions of which none rides past this work while it waits: they are asked of what
                it changes.
        """
        return await self._asked(client, tokens, tokens, None, lambda _: [work()], None, holds_back)

    async def run_merged(
        self,
        client: str,
        tokens: int,
        kind: Hashable,
        question: _Question,
        answer: Callable[[Sequence[_Question]], Sequence[_Result]],
    ) -> tuple[_Result, float]:
        """The answer to `question` and its share of the seconds, by its tokens, of the pass that answered it.

        When it is the turn of a question, questions of equal `kind` that wait are answered with it, by one call of its
        `answer` in the compute thread, in the order of their turns: as many as fit into `merge_tokens`. None passes an
        earlier call of its own client, or work that holds its kind back. With `merge_tokens` 0 this is `run`.

        Whoever goes away before its turn is not asked for; after it, its answer is dropped. If `answer` raises for
        several questions, it is called again for each of them alone, so that an error is told to the one whose question
        causes it: what it did until it raised must not count, or must not be done twice.

        Args:
            client: who pays: `CALL_TOKENS` at least.
            tokens: the tokens of the question, as they are.
            kind: what may be answered together; None: this is `run`.
            question: what `answer` is asked.
            answer: (questions) -> results, one for each, in the same order. Of one kind, all do the same.
        """
        paid = max(CALL_TOKENS, tokens)
        if kind is None or not self.merge_tokens:
            return await self.run(client, paid, lambda: answer([question])[0])
        return await self._asked(client, paid, tokens, question, answer, kind, ())

    async def drain(self) -> None:
        """Wait until nothing is running."""
        while self._busy:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Let the compute thread end."""
        self._thread.shutdown(wait=True)

    async def _asked(
        self,
        client: str,
        paid: int,
        tokens: int,
        question: Any,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        kind: Hashable,
        holds_back: Collection[Hashable],
    ) -> tuple[Any, float]:
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        with self._lock:
            served = max(self._served.get(client, 0), self._level)
            self._served[client] = served + paid
            if len(self._served) > self._most_served:  # else everyone who ever came would stay
                self._served = {name: ahead for name, ahead in self._served.items() if ahead > self._level}
                self._most_served = max(_KEPT, 2 * len(self._served))
            self._count += 1
            waiting = _Waiting(
                served, self._count, client, tokens, question, answer, kind, holds_back, answered,
                time.perf_counter(),
            )  # fmt: skip
            heapq.heappush(self._waiting, waiting)
            idle, self._busy = not self._busy, True
        if idle:
            try:
                self._thread.submit(self._compute, loop)
            except RuntimeError:  # the thread has ended
                self._busy = False
                raise
        try:
            return await answered
        finally:
            if waiting.spent_s is not None:
                self._worked(client, *waiting.spent_s)

    def _compute(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer what waits, one turn after the other, until nothing does. In the compute thread."""
        while together := self._due():
            begin_s = time.perf_counter()
            answers, seconds = _answers(together)
            # the next turn begins at once: the loop, which receives for all clients, tells this one when it comes to it
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self._tell_all, together, answers, begin_s, seconds)
            del together, answers  # large, and the next turn may be long

    def _due(self) -> list[_Waiting]:
        """The question that is due, and those that ride along; none: nothing waits, and nothing is computed now."""
        with self._lock:
            while self._waiting:
                due = heapq.heappop(self._waiting)
                if due.answered.done():
                    continue
                self._level = max(self._level, due.served)
                return [due, *self._riders(due)]
            self._busy = False
            return []

    def _riders(self, due: _Waiting) -> list[_Waiting]:
        """Take those that are answered with `due` out of the queue, and return them in the order of their turns."""
        left, riders, passed = self.merge_tokens - due.tokens, list[_Waiting](), set[str]()
        if due.kind is None or left <= 0:
            return riders
        queue = sorted(self._waiting)
        for waiting in queue:
            if waiting.answered.done():
                continue
            if due.kind in waiting.holds_back:
                break
            if waiting.kind == due.kind and waiting.tokens <= left and waiting.client not in passed:
                riders.append(waiting)
                left -= waiting.tokens
            else:
                passed.add(waiting.client)
        taken = {rider.number for rider in riders}
        self._waiting = [waiting for waiting in queue if waiting.number not in taken]  # sorted is a heap
        return riders

    def _tell_all(
        self, together: Sequence[_Waiting], answers: Sequence[_Answer], begin_s: float, seconds: float
    ) -> None:
        if together[0].kind is not None:
            self._tell(len(together))
        tokens = sum(waiting.tokens for waiting in together)
        for waiting, (result, error) in zip(together, answers, strict=True):
            took_s = seconds * (waiting.tokens / tokens if len(together) > 1 else 1.0)
            if waiting.answered.done():  # who asked has gone away
                self._worked(waiting.client, begin_s - waiting.asked_s, took_s)
                continue
            waiting.spent_s = begin_s - waiting.asked_s, took_s
            if error is not None:
                waiting.answered.set_exception(error)
            else:
                waiting.answered.set_result((result, took_s))


def _answers(together: Sequence[_Waiting]) -> tuple[list[_Answer], float]:
    """The answers and the seconds that they took. In the compute thread."""
    begin = time.perf_counter()
    answers = _tried(together)
    if len(together) > 1 and answers[0].error is not None:
        answers = [answer for waiting in together for answer in _tried([waiting])]
    return answers, time.perf_counter() - begin


def _tried(together: Sequence[_Waiting]) -> list[_Answer]:
    try:
        results = together[0].answer([waiting.question for waiting in together])
        assert len(results) == len(together), "an answer for each question"
    except BaseException as error:  # told to who asked, whatever it is; the thread goes on
        return [_Answer(None, error)] * len(together)
    return [_Answer(result, None) for result in results]
