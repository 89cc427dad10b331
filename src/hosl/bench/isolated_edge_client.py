"""The memory of a client on the inference engine, in a process that never imports torch (`edge_client_alone`).

The process holds what `hosl join` imports, too: it is the process that a device runs.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from hosl.bench.isolated_client import measured
from hosl.config import Config, parse_config
from hosl.system.machine import process_pages

_STEPS = 2
"""After the first one trained weights have pages of their own, and an optimiser its state."""
_LOOK_EVERY_S = 0.002
_LEAST_VOCABULARY = 4
"""Of a model without a token table."""
_PROGRAM = (
    "import sys; sys.modules['jaxtyping'] = None; from hosl.bench.isolated_edge_client import main; main()"
)
"""The process: without what only developers install, which takes 5 MiB where it is."""


def edge_client_alone(config: Config, half: Path, rows: int, tokens: int) -> dict[str, Any]:
    """Memory of the client's steps, as the system counts it, from a fresh process without torch.

    Args:
        config: the settings of the client.
        half: its folder, OUT/client of `hosl split --runtime onnx`.
        rows: rows of the batch.
        tokens: tokens per row.

    Returns:
        process_peak_bytes: the largest resident size, loading included (VmHWM). anonymous_bytes, file_bytes: the
        process's own pages then (RssAnon), and those of files, which the system may drop: code, and weights that were
        only read; of many looks at a step the one that saw most. base_bytes: resident before the first step: Python,
        modules, the engine.

    Raises:
        FailureError: if the process fails; too little memory looks the same.
    """
    settings = msgspec.json.encode(config).decode()
    command = [
        sys.executable, "-c", _PROGRAM, settings, str(half), str(rows), str(tokens),
    ]  # fmt: skip
    return measured(command, f"the client on the engine ({config.method}, {rows} x {tokens} tokens)")


def _measure(config: Config, half: Path, rows: int, tokens: int) -> dict[str, int]:
    import hosl.network.join
    import hosl.network.onnx_runtime as runtime
    from hosl.methods.step import method_round
    from hosl.methods.synthetic import NoServer, synthetic_batch
    from hosl.system.allocator import return_freed_memory
    from hosl.system.machine import process_bytes, process_peak_bytes

    assert hosl.network.join, "a device holds its imports"
    return_freed_memory()  # as `hosl join` does
    client: Any = runtime.open_client(config, half)
    table = client.half.facts.prelude.table
    vocabulary = client.half.weights.shape(table)[0] if table else _LEAST_VOCABULARY
    batch = synthetic_batch(vocabulary, rows, tokens)
    base = process_bytes()
    with PagesSeen() as seen:
        for step in range(1, _STEPS + 1):
            method_round(config, client, NoServer(), batch, step)
    assert "torch" not in sys.modules, "what is measured is a device without torch"
    return {
        "process_peak_bytes": process_peak_bytes(),
        "anonymous_bytes": seen.anonymous_bytes,
        "file_bytes": seen.file_bytes,
        "base_bytes": base,
    }


class PagesSeen:
    """Context manager: the pages of this process, by kind, when a thread that looks again and again saw most."""

    def __init__(self) -> None:
        self.anonymous_bytes = self.file_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "PagesSeen":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            found = process_pages()
            if sum(found) > self.anonymous_bytes + self.file_bytes:
                self.anonymous_bytes, self.file_bytes = found
            if self._done.wait(_LOOK_EVERY_S):
                return


def main() -> None:
    """The process itself: prints what it took as JSON."""
    settings, folder, *numbers = sys.argv[1:]
    parsed = parse_config(msgspec.json.decode(settings), where="of the benchmark")
    sys.stdout.write(json.dumps(_measure(parsed, Path(folder), *map(int, numbers))) + "\n")
