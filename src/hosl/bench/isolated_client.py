"""The cost of a client by itself: its steps without any server or network, in a process of its own (`client_alone`)."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from hosl.config import Config, parse_config
from hosl.errors import FailureError


def client_alone(
    config: Config, half: Path, rows: int, tokens: int, steps: int = 1, *, joining: bool = False
) -> dict[str, Any]:
    """Memory and time of the client's steps, measured in a fresh process that loads no network code.

    Args:
        config: the settings of the client.
        half: its folder, OUT/client of `hosl split`.
        rows: rows of the batch.
        tokens: tokens per row.
        steps: steps before the one whose tensors are followed. With 0 that step is the only one: half the time, but the
            peak of the process then includes the profiler's records.
        joining: whether the process holds all that `hosl join` imports, the network's code too.

    Returns:
        process_peak_bytes: the largest resident size of the process, loading included. tensor_peak_bytes: the peak of
        tensors during a step, weights and optimiser state included; forward_peak_bytes: during a plain forward pass,
        weights included; held_bytes: between steps. client_s: seconds of a step inside the client, the median of all
        steps but the first. bytes_up, bytes_down: bytes of a step, as `hosl.parties.metered` counts them.

    Raises:
        FailureError: if the process fails; too little memory looks the same.
    """
    settings = msgspec.json.encode(config).decode()
    numbers = [str(number) for number in (rows, tokens, steps, int(joining))]
    command = [sys.executable, "-m", "hosl.bench.isolated_client", settings, str(half), *numbers]
    return measured(command, f"the client alone ({config.method}, {rows} x {tokens} tokens)")


def measured(command: Sequence[str], who: str) -> dict[str, Any]:
    """The figures that a process prints as JSON.

    Raises:
        FailureError: naming `who`, if the process fails.
    """
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last_lines = process.stderr.strip().splitlines()[-1:]
        reason = " ".join(last_lines) or f"it ended with status {process.returncode}"
        raise FailureError(f"{who} could not be measured: {reason}")
    return json.loads(process.stdout)


def _measure(config: Config, half: Path, rows: int, tokens: int, steps: int, joining: int) -> dict[str, Any]:
    if joining:
        import hosl.network.join
        import hosl.network.torch_runtime

        assert hosl.network.torch_runtime, "a device holds its imports"
    from hosl.methods.step import method_round
    from hosl.methods.synthetic import NoServer, fixed_batch
    from hosl.methods.torch_parties import DTYPES, make_client, party_bytes
    from hosl.parties.engine.memory import TorchMemory
    from hosl.parties.metered import Meter, metered
    from hosl.split import load_half
    from hosl.system.allocator import return_freed_memory
    from hosl.system.machine import process_peak_bytes

    return_freed_memory()  # as `hosl join` does
    loaded: Any = load_half(half)
    loaded.convert(DTYPES[config.model.dtype])
    client = make_client(config, loaded)
    batch, server = fixed_batch(client, rows, tokens), NoServer()
    client_meter, server_meter, seconds = Meter(), Meter(), []
    weights = party_bytes(client)  # later an optimiser's state is held, too
    for step in range(1, steps + 1):
        server_meter.take()
        method_round(config, metered(client, client_meter), metered(server, server_meter), batch, step)
        seconds.append(client_meter.take().seconds)
    process_peak, held = process_peak_bytes(), party_bytes(client)
    forward, step_memory = TorchMemory(weights), TorchMemory(held)
    forward.watch(client.forward, batch)
    step_memory.watch(method_round, config, client, server, batch, steps + 1)
    assert joining or "grpc" not in sys.modules, "what is measured is a client without a network"
    return {
        "process_peak_bytes": process_peak if steps else process_peak_bytes(),
        "held_bytes": held,
        "forward_peak_bytes": forward.peak_bytes,
        "tensor_peak_bytes": step_memory.peak_bytes,
        "client_s": median(seconds[1:] or seconds or [0.0]),
        "bytes_up": server_meter.bytes_in,
        "bytes_down": server_meter.bytes_out,
    }


if __name__ == "__main__":
    settings, folder, *numbers = sys.argv[1:]
    parsed = parse_config(msgspec.json.decode(settings), where="of the benchmark")
    sys.stdout.write(json.dumps(_measure(parsed, Path(folder), *map(int, numbers))) + "\n")
