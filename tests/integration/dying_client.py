"""`hosl join` that kills itself (SIGKILL) at a call: python dying_client.py CALL N before|after join ...

`before`: before the question is sent. `after`: when its answer has been read, before anything is done with it.
"""

import os
import signal
import sys

from hosl.cli import main
from hosl.transport.channel import Channel

call, number, when = sys.argv[1], int(sys.argv[2]), sys.argv[3]
seen = [0]


def at(name, moment):
    if name == call and moment == "before":
        seen[0] += 1
    if name == call and seen[0] == number and when == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def dying(method):
    def asked(self, name, *rest):
        at(name, "before")
        answer = method(self, name, *rest)
        at(name, "after")
        return answer

    return asked


def dying_stream(method):
    def asked(self, name, *rest):
        at(name, "before")
        yield from method(self, name, *rest)
        at(name, "after")

    return asked


Channel.ask, Channel.upload = dying(Channel.ask), dying(Channel.upload)
Channel.converse = dying_stream(Channel.converse)
sys.exit(main(sys.argv[4:]))
