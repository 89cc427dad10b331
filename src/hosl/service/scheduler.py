"""Fair scheduling: one piece of compute at a time, for the waiting client that has been served fewest tokens."""

import asyncio
import heapq
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")
CALL_TOKENS = 64
"""The tokens that a call costs at least, however little it carries: about a pass over the weights without tokens."""
HELLO_TOKENS = 4096
"""The tokens of a hello or a save: weights are read or written."""
_KEPT = 1024
"""More clients than these: those whose served tokens are not above the level are forgotten, which changes no turn."""


class Scheduler:
    """Fair queueing over clients, weighed by tokens (rows x positions). One thread computes; for one event loop.

    A client that was away does not save up turns: it starts at the level of the one served least among the waiting.
    """

    def __init__(
        self, worked: Callable[[str, float, float], None] = lambda client, wait_s, took_s: None
    ) -> None:
        """`worked` is called after each piece of work: whose it was, the seconds that it waited, and that it took."""
        self._worked = worked
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hosl-compute")
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._served: dict[str, int] = {}
        self._most_served = _KEPT
        self._level = 0
        self._count = 0
        self._busy = False

    @property
    def queue(self) -> int:
        """The number of pieces of work that wait."""
        return sum(1 for _, _, turn in self._waiting if not turn.done())

    async def run(self, client: str, tokens: int, work: Callable[[], _Result]) -> tuple[_Result, float]:
        """Run `work` in the compute thread when it is `client`'s turn; returns its result and its seconds."""
        served = max(self._served.get(client, 0), self._level)
        self._served[client] = served + tokens
        if len(self._served) > self._most_served:  # else everyone who ever came would stay
            self._served = {name: ahead for name, ahead in self._served.items() if ahead > self._level}
            self._most_served = max(_KEPT, 2 * len(self._served))
        asked = time.perf_counter()
        turn = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._waiting, (served, self._count, turn))
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._done()
            raise
        begin = time.perf_counter()
        computed = asyncio.get_running_loop().run_in_executor(self._thread, work)

        def ended(_: object = None) -> None:
            self._worked(client, begin - asked, time.perf_counter() - begin)
            self._done()

        try:
            # a caller that goes away does not stop the work half way: what it changes, it changes whole
            return await asyncio.shield(computed), time.perf_counter() - begin
        finally:
            if computed.done():
                ended()
            else:
                computed.add_done_callback(ended)

    async def drain(self) -> None:
        """Wait until nothing is running."""
        while self._busy:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Let the compute thread end."""
        self._thread.shutdown(wait=True)

    def _next(self) -> None:
        while not self._busy and self._waiting:
            served, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self._busy, self._level = True, max(self._level, served)
                turn.set_result(None)

    def _done(self) -> None:
        self._busy = False
        self._next()
