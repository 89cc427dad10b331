"""`hosl serve` as a process beside a benchmark, and what the system counts of it."""

import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosl.errors import FailureError
from hosl.system.machine import peak_bytes_of
from hosl.transport.join_line import JoinLine

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class ServedHalf:
    """A server that runs, and the join line that it printed."""

    process: "subprocess.Popen[str]"
    line: JoinLine
    certificate: Path
    """Its certificate, PEM."""
    page: str
    """The address of its page, https://host:port/."""

    @property
    def loop_cpu_s(self) -> float:
        """CPU seconds of its first thread, which runs the event loop; 0 where the system does not say."""
        return _cpu_s(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat"))

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all its threads; 0 where the system does not say."""
        return _cpu_s(Path(f"/proc/{self.process.pid}/stat"))

    def metric(self, line: str) -> float:
        """The number of a line of /metrics, such as `hosl_queue_length`; 0 where there is none yet."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False  # the certificate is its own
        ask = urllib.request.Request(
            f"{self.page}metrics", headers={"Authorization": f"Bearer {self.line.token}"}
        )
        with urllib.request.urlopen(ask, context=context, timeout=60) as reply:
            text: str = reply.read().decode()
        found = [rest for name, _, rest in (row.rpartition(" ") for row in text.splitlines()) if name == line]
        return float(found[0]) if found else 0.0

    @property
    def peak_mib(self) -> float:
        """The most memory that it has had resident, MiB; 0 where the system does not say."""
        return peak_bytes_of(self.process.pid) / _MIB


@contextmanager
def served_half(halves: Path, *words: str) -> Iterator[ServedHalf]:
    """Context manager: `hosl serve` of `halves`/server on a free port of loopback, state in `halves`/service.

    `words`: more of its arguments.

    Raises:
        FailureError: if it does not start.
    """
    program = "import sys; from hosl.cli import main; sys.exit(main())"
    arguments = ["serve", str(halves / "server"), "--listen", "127.0.0.1:0", "--page", "127.0.0.1:0"]
    with (halves / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments, "--service", str(halves / "service"), *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        log_file, certificate = halves / "server.log", halves / "service" / "certificate.pem"
        line = JoinLine.parse(_said(process, "hosl://", log_file))
        page = _said(process, "serving ", log_file).split()[-1]
        yield ServedHalf(process, line, certificate, page)
    finally:
        process.terminate()
        process.communicate()


def _said(process: "subprocess.Popen[str]", begin: str, log: Path) -> str:
    """The next line of a server that begins so."""
    assert process.stdout is not None, "it is a pipe"
    for text in process.stdout:
        if text.startswith(begin):
            return text
    raise FailureError(f"the server of the benchmark did not start: {log.read_text(errors='replace')[-500:]}")


def _cpu_s(stat: Path) -> float:
    try:
        fields = stat.read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
