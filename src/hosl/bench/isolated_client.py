"""A client's steps without any server or network: what it costs by itself. In a process of its own: `client_alone`."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from hosl.config import Config, parse_config
from hosl.errors import FailureError


def client_alone(config: Config, half: Path, rows: int, tokens: int, steps: int = 1) -> dict[str, Any]:
    """Memory of the client's steps, in bytes, measured in a fresh process that loads no network code.

    `steps` are made before the one whose tensors are followed; with 0, that one is all there is, in half the time, and
    what the process peaks at holds the profiler's records, too.

    Returns:
        process_peak_bytes: the most the process has had resident, loading included. tensor_peak_bytes: of tensors
        during a step, weights and optimiser state included; forward_peak_bytes: during a plain forward pass, weights
        included; held_bytes: between steps. client_s: seconds of a step inside the client, the median of all steps but
        the first. bytes_up, bytes_down: of a step, as `hosl.parties.metered` counts them.

    Raises:
        FailureError: if the process fails, which is also what too little memory looks like.
    """
    settings = msgspec.json.encode(config).decode()
    numbers = [str(number) for number in (rows, tokens, steps)]
    command = [sys.executable, "-m", "hosl.bench.isolated_client", settings, str(half), *numbers]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        said = " ".join(ran.stderr.strip().splitlines()[-1:]) or f"it ended with status {ran.returncode}"
        raise FailureError(
            f"the client alone ({config.method}, {rows} x {tokens} tokens) could not be measured: {said}"
        )
    return json.loads(ran.stdout)


def _measure(config: Config, half: Path, rows: int, tokens: int, steps: int) -> dict[str, Any]:
    from hosl.methods.step import method_round
    from hosl.methods.synthetic import NoServer, fixed_batch
    from hosl.methods.torch_parties import DTYPES, make_client, party_bytes
    from hosl.parties.engine.memory import TorchMemory
    from hosl.parties.metered import Meter, Metered
    from hosl.split import load_half
    from hosl.system.allocator import return_freed_memory
    from hosl.system.machine import process_peak_bytes

    return_freed_memory()  # as `hosl join` does
    loaded: Any = load_half(half)
    loaded.convert(DTYPES[config.model.dtype])
    client = make_client(config, loaded)
    batch, server = fixed_batch(client, rows, tokens), NoServer()
    of_client, of_server, seconds = Meter(), Meter(), []
    weights = party_bytes(client)  # later an optimiser's state is held, too
    for step in range(1, steps + 1):
        of_server.take()
        method_round(config, Metered(client, of_client), Metered(server, of_server), batch, step)
        seconds.append(of_client.take().seconds)
    process_peak, held = process_peak_bytes(), party_bytes(client)
    forward, step_memory = TorchMemory(weights), TorchMemory(held)
    forward.watch(client.forward, batch)
    step_memory.watch(method_round, config, client, server, batch, steps + 1)
    assert "grpc" not in sys.modules, "what is measured is a client without a network"
    return {
        "process_peak_bytes": process_peak if steps else process_peak_bytes(),
        "held_bytes": held,
        "forward_peak_bytes": forward.peak_bytes,
        "tensor_peak_bytes": step_memory.peak_bytes,
        "client_s": median(seconds[1:] or seconds or [0.0]),
        "bytes_up": of_server.bytes_in,
        "bytes_down": of_server.bytes_out,
    }


if __name__ == "__main__":
    asked, folder, *numbers = sys.argv[1:]
    known = parse_config(msgspec.json.decode(asked), where="of the benchmark")
    sys.stdout.write(json.dumps(_measure(known, Path(folder), *map(int, numbers))) + "\n")
