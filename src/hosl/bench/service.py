"""`hosl bench service`: what a server does for many devices, with simulated ones on loopback.

The half is tiny: what is measured is the service, not the model. Read the ratios; seconds are of this machine, which
computes the devices, too.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.bench.server_process import ServedHalf, served_half
from hosl.bench.service_devices import Orders, Seen
from hosl.config import ClientsConfig, Config, ModelConfig, ZOConfig
from hosl.errors import FailureError
from hosl.network.handshake import model_message, training_message
from hosl.service.access import Access
from hosl.split.reading.half_json import half_facts
from hosl.transport.join_line import address_of

_GIB = 2**30
_SIZES = BenchSizes("tiny", 2, 4, 16)
_WIDTH = 64
"""Of its hidden states."""
_LARGE_ROWS, _LARGE_TOKENS = 128, 128
"""An activation of 4 MiB in the tiny shape: what is measured is the tensor's way in, more than what is computed."""
_CROWD = 64
"""The devices that are set against one which asks as fast as it is answered."""
_DEVICES_OF_A_PROCESS = 250


def bench_service(
    clients: int, *, seconds: float, rounds: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure one server with 1, 64 and `clients` simulated devices; returns the figures of each part.

    Args:
        clients: devices that take part in the rounds of one synchronous run with shared halves.
        seconds: of each part in which devices ask as fast as they are answered.
        rounds: rounds of all devices.
        say: is called with a line of progress before each part.

    Raises:
        FailureError: if the server or a process of devices fails.
    """
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        say("making a half")
        halves = random_halves(_SIZES, Path(name))
        words = ("--calls-per-s", "1000000", "--runs-at-once", "4")
        with served_half(halves, *words) as served:
            say(f"enrolling {clients} clients")
            access = Access(halves / "service")
            tokens = [access.enrol(f"device-{number}") for number in range(max(clients, _CROWD))]
            bench = _Bench(served, halves, tokens)
            say(f"1 device asks for {seconds:g} s")
            one = bench.questions("one", 1, seconds)
            say(f"{_CROWD} devices ask for {seconds:g} s")
            crowd = bench.questions("crowd", _CROWD, seconds)
            say(f"activations of 4 MiB for {seconds:g} s")
            ingest = bench.ingest(seconds)
            say(f"{rounds} rounds of {clients} devices")
            together = bench.rounds(clients, rounds)
            peak_mib = served.peak_mib
    return {
        "clients": clients, "seconds": seconds,
        "questions_per_s_of_1": one["per_s"], f"questions_per_s_of_{_CROWD}": crowd["per_s"],
        f"{_CROWD}_over_1": crowd["per_s"] / one["per_s"], "fairness_least_over_most": crowd["least_over_most"],
        "wait_p50_s": crowd["p50_s"], "wait_p99_s": crowd["p99_s"], **ingest, **together,
        "server_peak_mib": round(peak_mib, 1),
    }  # fmt: skip


class _Bench:
    """The parts of the benchmark, against one server."""

    def __init__(self, served: ServedHalf, halves: Path, tokens: Sequence[str]) -> None:
        self._served, self._halves, self._tokens = served, halves, tokens
        self._certificate = (halves / "service" / "certificate.pem").read_text(encoding="ascii")
        self._facts = half_facts(halves / "client", "client")

    def questions(self, run: str, clients: int, seconds: float) -> dict[str, float]:
        """Small questions by `clients` devices, each with four under way."""
        (seen,), _, _ = self._run(
            self._orders(run, self._tokens[:clients], work="questions", seconds=seconds)
        )
        if not all(seen.answered):
            raise FailureError(
                f"{seen.answered.count(0)} of {clients} devices had no answer within {seconds:g} s; give more --seconds"
            )
        return {
            "per_s": sum(seen.answered) / seconds,
            "p50_s": float(np.quantile(seen.waits_s, 0.5)),
            "p99_s": float(np.quantile(seen.waits_s, 0.99)),
            "least_over_most": min(seen.answered) / max(seen.answered),
        }

    def ingest(self, seconds: float) -> dict[str, float]:
        """Large activations by two devices, refused once they are here: CPU seconds of the server for each GiB."""
        orders = self._orders(
            "large", self._tokens[:2], work="refused", seconds=seconds, rows=_LARGE_ROWS, seq=_LARGE_TOKENS
        )
        (seen,), loop_cpu_s, cpu_s = self._run(orders)
        gib = seen.sent_bytes / _GIB
        return {"loop_cpu_s_per_gib": loop_cpu_s / gib, "all_cpu_s_per_gib": cpu_s / gib}

    def rounds(self, clients: int, rounds: int) -> dict[str, float]:
        """Rounds of all devices, each with a Step and an update of its own."""
        parts = [
            self._tokens[first : min(first + _DEVICES_OF_A_PROCESS, clients)]
            for first in range(0, clients, _DEVICES_OF_A_PROCESS)
        ]
        seen, _, cpu_s = self._run(
            *(self._orders("rounds", part, work="rounds", rounds=rounds, count=clients) for part in parts)
        )
        closed, took_s = (
            self._served.metric(f'hosl_compute_seconds_{what}{{call="Round"}}') for what in ("count", "sum")
        )
        lengths_s = [max(of_round) for of_round in zip(*(part.rounds_s for part in seen), strict=True)]
        return {
            "round_s": float(np.median(lengths_s)),
            "round_cpu_s": cpu_s / rounds,
            "round_closing_s": took_s / closed,
        }

    def _orders(
        self,
        run: str,
        tokens: Sequence[str],
        *,
        work: Literal["questions", "refused", "rounds"],
        count: int | None = None,
        **more: Any,
    ) -> Orders:
        config = Config(
            method="hosl", max_steps=10_000, model=ModelConfig(cut=_SIZES.cut), zo=ZOConfig(directions=10),
            clients=ClientsConfig(
                count=max(count or len(tokens), 2), halves="shared", schedule="synchronous", grace_s=600.0,
                directions="common",
            ),
        )  # fmt: skip
        given: dict[str, Any] = {"rows": _SIZES.rows, "seq": _SIZES.tokens} | more
        return Orders(
            address=address_of("127.0.0.1", self._served.line.port), certificate=self._certificate,
            tokens=tuple(tokens), model=model_message(self._facts, config).SerializeToString(),
            training=training_message(config).SerializeToString(), run=run, width=_WIDTH, work=work, **given,
        )  # fmt: skip

    def _run(self, *orders: Orders) -> tuple[list[Seen], float, float]:
        """What the devices of each process saw, and the CPU seconds of the server's loop and of all its threads."""
        command = [sys.executable, "-m", "hosl.bench.service_devices"]
        processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in orders
        ]
        try:
            for process, order in zip(processes, orders, strict=True):
                _tell(process, msgspec.json.encode(order).decode())
            for process in processes:
                _heard(process)  # ready: all have said hello
            before = self._served.loop_cpu_s, self._served.cpu_s
            for process in processes:
                _tell(process, "go")
            seen = [msgspec.json.decode(_heard(process), type=Seen) for process in processes]
            loop_cpu_s, cpu_s = self._served.loop_cpu_s - before[0], self._served.cpu_s - before[1]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        return seen, loop_cpu_s, cpu_s


def _tell(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdin is not None, "it is a pipe"
    with suppress(BrokenPipeError):  # it failed, as its output will say
        process.stdin.write(text + "\n")
        process.stdin.flush()


def _heard(process: "subprocess.Popen[str]") -> str:
    """The next line of a process of devices.

    Raises:
        FailureError: if it ended without one.
    """
    assert process.stdout is not None, "it is a pipe"
    line = process.stdout.readline()
    if not line:
        said = process.communicate()[1].strip().splitlines()[-1:]
        raise FailureError(f"the simulated devices failed: {' '.join(said) or 'without a word'}")
    return line
