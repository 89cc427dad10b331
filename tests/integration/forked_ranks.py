"""`hosl serve --ranks` whose ranks are forked, to spare their imports: forked_ranks.py DO RANK N MARKER serve ...

Rank RANK kills itself (SIGKILL) at its Nth command DO, unless the file MARKER exists, which it makes. DO `-`: never.
"""

import os
import pathlib
import signal
import subprocess
import sys
import threading

from hosl.cli import main
from hosl.ranks import launcher
from hosl.ranks.hosting import Ranks

do, rank, number, marker = sys.argv[1:5]
words = sys.argv[5:]
seen = [0]
done = Ranks._done


def dying(self, what, *rest):
    seen[0] += what == do
    now = what == do and seen[0] == int(number) and self.group.rank == int(rank)
    if now and not os.path.exists(marker):
        pathlib.Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return done(self, what, *rest)


class ForkedRank:
    """A rank as `subprocess.Popen` would start it."""

    def __init__(self, command, *, env, stdin, start_new_session):
        assert stdin == subprocess.PIPE
        assert start_new_session
        assert threading.active_count() == 1, "a fork would leave the other threads out"
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setsid()
                os.dup2(read, 0)
                os.closerange(3, write + 1)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.clear()
                os.environ.update(env)
                status = main([*words, *command[-2:]])
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(read)
        self.stdin = os.fdopen(write, "wb")
        self.returncode = None

    def poll(self):
        return self._ended(os.WNOHANG)

    def wait(self):
        return self._ended(0)

    def _ended(self, options):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    Ranks._done = dying
    launcher.Launcher.__init__.__kwdefaults__["start"] = ForkedRank
    sys.exit(main(words))
