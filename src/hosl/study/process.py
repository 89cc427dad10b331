"""Run of a study at work: `hosl train` in a process of its own, which ends with the study however that ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from hosl.config import Config, dump_config
from hosl.errors import FailureError, FolderError, NonFiniteError, RequestError
from hosl.study.files import Places, begun, write_config, write_summary
from hosl.study.grid import Summary, Trial
from hosl.system.interrupts import Stop
from hosl.system.run_folder import RunLock

# A study that is killed cannot end its runs; its end of the pipe closes all the same.
_HOSL = (
    "import os, sys, threading\n"
    "threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()\n"
    "from hosl.cli import main\n"
    "sys.exit(main())\n"
)
_ORPHANS_END_S = 30.0
POLL_S = 0.1
"""Seconds between two looks at a run."""


class RunProcess:
    """Run that has been started, or taken up again where a killed study left it."""

    def __init__(self, run: Trial, places: Places) -> None:
        self.run, self._places = run, places
        config, folder = places.config(run), places.run_folder(run)
        self._begin, self._stopped = time.monotonic(), False
        _wait_until_free(folder)
        if begun(folder, config):
            arguments = ["--resume", str(folder)]
        else:
            write_config(run, places)
            arguments = [str(places.config_file(run))]
        places.runs.mkdir(parents=True, exist_ok=True)
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `take` or `kill`)
        with self._log.open("ab") as log:
            self._earlier_bytes = log.tell()  # what attempts before this one said
            self._process = _hosl_train([*arguments, "--json"], out=self._out, err=log)

    @property
    def ended(self) -> bool:
        """Whether there is something to `take`."""
        return self._process.poll() is not None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def take(self) -> Summary | None:
        """The summary of a run that has ended, kept on the disk too; None for one that was stopped.

        Raises:
            RequestError, FailureError: with the run's own message.
        """
        status = self._process.returncode
        self._out.seek(0)
        out = self._out.read()
        self._close()
        if status in (130, -signal.SIGTERM):
            return None
        if status == 0:
            return write_summary(self.run, self._places, json.loads(out.splitlines()[-1]))
        if status < 0:
            advice = "; perhaps memory ran out: lower at_once" if status == -signal.SIGKILL else ""
            raise FailureError(f"run {self.run.name} {_ended_by(-status)}{advice}; all it said: {self._log}")
        message = self._message(out)
        if status == NonFiniteError.exit_status:
            # a rate so high that it diverges is a result of the study, not of the program
            return write_summary(self.run, self._places, {"diverged": message, "dev_loss_nats": None})
        kind = RequestError if status == 2 else FailureError
        raise kind(f"run {self.run.name} failed: {message}; all it said: {self._log}")

    def stop(self) -> None:
        """Ask the run to end after the step in hand, with a checkpoint; asking again changes nothing."""
        if not self._stopped:  # a second signal would end it at once
            self._process.terminate()
        self._stopped = True

    def kill(self) -> None:
        """End the run at once; it goes on from its newest checkpoint."""
        self._process.kill()
        self._process.wait()
        self._close()

    @property
    def _log(self) -> Path:
        return self._places.runs / f"{self.run.name}.log"

    def _message(self, out: bytes) -> str:
        """The error that it printed; of a run that ended before it could, the last line of this attempt's log."""
        with contextlib.suppress(ValueError, LookupError, TypeError):
            return json.loads(out.splitlines()[-1])["error"]["message"]
        log = self._log.read_bytes()[self._earlier_bytes :].decode(errors="replace")
        return (log.strip().splitlines() or ["nothing was said"])[-1]

    def _close(self) -> None:
        self._out.close()
        if self._process.stdin is not None:
            self._process.stdin.close()


def make_alone(config: Config, *, as_json: bool) -> int:
    """Make a run in the foreground, to the bits that it has in a study; returns its exit status.

    In a process of its own: threads are counted when numpy and torch are loaded.

    Raises:
        FailureError: if a signal ended it.
    """
    with tempfile.TemporaryDirectory() as folder, Stop() as stop:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        with _hosl_train([str(file), *(["--json"] if as_json else [])]) as process:
            try:
                while process.poll() is None and not stop.requested:
                    time.sleep(POLL_S)
                if stop.requested:
                    process.terminate()
                status = process.wait()
            finally:  # a second Ctrl-C does not wait
                process.kill()
    if status == -signal.SIGTERM:  # asked before it could listen
        return 130
    if status < 0:
        raise FailureError(f"the run {_ended_by(-status)}")
    return status


def _hosl_train(
    arguments: list[str], *, out: IO[bytes] | None = None, err: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _HOSL, "train", *arguments],
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # runs share the cores by their number alone
        start_new_session=True,  # Ctrl-C reaches it once, when it is asked to stop
    )


def _ended_by(number: int) -> str:
    return f"was ended by signal {number} ({signal.strsignal(number)})"


def _wait_until_free(folder: Path) -> None:
    """A run whose study was killed ends by itself, a moment later."""
    patience = time.monotonic() + _ORPHANS_END_S
    while folder.is_dir():
        try:
            with RunLock(folder):
                return
        except FolderError:
            if time.monotonic() > patience:
                raise
            time.sleep(0.2)
