"""`hosl serve` that kills itself (SIGKILL) at a call: python dying_server.py CALL N before|after serve ...

`before`: when the question is complete and nothing was done. `after`: when it was done and the answer was not yet sent.
"""

import os
import signal
import sys

from hosl.cli import main
from hosl.service import calls
from hosl.service.scheduler import Scheduler

call, number, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
seen, current = [0], [""]
run = Scheduler.run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


async def dying(self, *asked, **how):
    if current[0] == call:
        seen[0] += 1
        if seen[0] == number and when == "before":
            die()
    answer = await run(self, *asked, **how)
    if current[0] == call and seen[0] == number and when == "after":
        die()
    return answer


served = calls.Calls._served


def watched(self, name, handler):
    async def named(calls_, client, incoming):
        current[0] = name  # one client asks one question at a time here
        async for part in handler(calls_, client, incoming):
            yield part

    return served(self, name, named)


Scheduler.run = dying
calls.Calls._served = watched
sys.exit(main(sys.argv[4:]))
