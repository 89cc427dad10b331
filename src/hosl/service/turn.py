"""The turn of one client among several whose labels stay: from the states of its step until its update is made.

In the sequential schedule each step is applied as it comes. A step whose gradient is computed on the device comes in
two parts, and no other update may fall between them. Whoever holds the turn too long loses it, so that nobody waits for
ever; its gradient then counts at the blocks as they are.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Turn:
    """The turn of one run; those who wait get it in the order in which they came."""

    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def taken(self, most_s: float) -> AsyncIterator[None]:
        """Wait for the turn, and hold it for `most_s` seconds at most."""
        await self._lock.acquire()
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._lock.release()

        timer = asyncio.get_running_loop().call_later(most_s, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()
