"""A split model, a server process and joined clients, for the tests of the network. Loopback only."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import safetensors.torch

from hosl.cli import main
from tests.integration.forked import Forked

HOSL = [sys.executable, "-c", "import sys; from hosl.cli import main; sys.exit(main())"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def split(model, out, cut=2, **more):
    """`hosl split` of a classifier; returns the folder."""
    words = [
        "split",
        str(model),
        str(out),
        "--cut",
        str(cut),
        "--head",
        "classification",
        "--labels",
        "2",
        "--json",
    ]
    assert main([*words, *(part for k, v in more.items() for part in (f"--{k}", str(v)))]) == 0
    return out


class Server:
    """`hosl serve` in a process of its own. `program` replaces the plain command, to have it die at a given point.

    `start=anew`: one that has not loaded gRPC yet, which reads its list of ciphers once.
    """

    def __init__(self, half, service, *words, listen="127.0.0.1:0", program=None, start=Forked):
        command = [
            *(program or HOSL),
            "serve",
            str(half),
            "--service",
            str(service),
            "--listen",
            listen,
            *words,
        ]
        self.service = service
        self.log = open(service.with_suffix(".log"), "ab")  # noqa: SIM115
        self.process = start(command, env=ENVIRONMENT, stderr=self.log)
        self.said, self.line = [], None
        while True:
            text = self.process.stdout.readline()
            if not text:
                raise AssertionError(f"the server ended: {service.with_suffix('.log').read_text()[-2000:]}")
            self.said.append(text.strip())
            if text.startswith("hosl://"):
                self.line = text.strip()
            if text.startswith("serving"):
                break
        self.address = json.loads((service / "address.json").read_text())["address"]

    @property
    def events(self):
        """The structured log so far."""
        lines = self.service.with_suffix(".log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def stop(self, wait_s=60):
        """SIGTERM; the exit status."""
        self.process.terminate()
        status = self.process.wait(wait_s)
        self.close()
        return status

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self):
        return self

    def __exit__(self, *how):
        self.close()


def enrol(service, name, capsys):
    """`hosl clients add NAME`; the join line."""
    capsys.readouterr()
    assert main(["clients", "add", name, "--service", str(service)]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "hosl://" in text]
    return line.partition(": ")[2]


def join(half, line, config, *words, start=Forked):
    """`hosl join` in a process of its own; `start=anew`: one that holds nothing else, for tests of its memory."""
    command = [*HOSL, "join", str(half), "--to", line, "--config", str(config), "--json", *map(str, words)]
    return start(command, env=ENVIRONMENT)


anew = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process, wait_s=240):
    """The summary of a process that must succeed."""
    out, err = process.communicate(timeout=wait_s)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def newest(folder):
    """The newest checkpoint below a folder."""
    return max(Path(folder).glob("step-*"))


def server_state(service):
    """The server half of the one run of a service, as named tensors."""
    (run,) = (service / "runs").iterdir()
    return safetensors.torch.load_file(newest(run / "checkpoints") / "server" / "trained.safetensors")


def wait_until(true, seconds=60.0):
    """Poll, so that no test waits longer than it must."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
