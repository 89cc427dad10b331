"""Commands in processes of their own, forked from one that has imported torch: a start costs hundredths of a second.

Each is as one that `subprocess.Popen` starts: with its own id, pipes, signals and exit status.
`tests/integration/test_examples.py` and `tests/unit/test_command.py` start theirs anew.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

PARENT = multiprocessing.get_context("forkserver")
"""Forks processes that have loaded what stands here; there is one such parent of all tests."""
PARENT.set_forkserver_preload(
    [
        "hosl.network.serve",
        "hosl.network.join",
        "hosl.training.train",
        "hosl.report.build",
        "tests.remembered_peaks",
        # half of a tiny run's seconds are the imports of what follows, which is loaded late
        "matplotlib.backends.backend_svg",
        "matplotlib.figure",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
        "transformers.models.opt.modeling_opt",
        "hosl.ranks.hosting",
        "torch._dynamo",  # by fully_shard
        "tests.ranks",
    ]
)


class Forked:
    """`command`, a Python program as [sys.executable, PATH or "-c", ...]; what it writes is text."""

    def __init__(self, command, *, env, stderr=subprocess.PIPE):
        """Start it. `stderr` is PIPE or an open file."""
        (self.stdout, out), (self.stderr, err) = (
            _pipe(),
            _pipe() if stderr == subprocess.PIPE else (None, stderr),
        )
        with patch.dict(os.environ, env):  # of the first one, as torch reads its threads when it is imported
            multiprocessing.forkserver.ensure_running()
        out_end, err_end = (
            multiprocessing.connection.Connection(os.dup(file.fileno())) for file in (out, err)
        )
        self._process = PARENT.Process(
            target=_become, args=([str(word) for word in command[1:]], dict(env), out_end, err_end)
        )
        self._process.start()
        for end in (out_end, err_end, out, *([err] if stderr == subprocess.PIPE else [])):
            end.close()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """The exit status, or less the signal's number; None: it has not ended."""
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout=None):
        """Wait for the end; the exit status."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("hosl", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for the end; what it wrote to standard output and standard error."""
        with ThreadPoolExecutor(2) as readers:
            read = [readers.submit(_rest, file) for file in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return tuple(of_one.result() for of_one in read)

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self):
        """SIGKILL, unless it has ended."""
        self._process.kill()

    def terminate(self):
        """SIGTERM, unless it has ended."""
        self._process.terminate()


def _pipe():
    read, write = os.pipe()
    return os.fdopen(read, "r"), os.fdopen(write, "w")


def _rest(file):
    if file is None or file.closed:
        return ""
    with file:
        return file.read()


def _become(words, environment, out, err):
    for place, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), place)
        end.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")
