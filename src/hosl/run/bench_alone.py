"""A client's steps without any server, in a process that loads no network code: its own peak memory, to subtract."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hosl.config import Config, parse_config
from hosl.core.parties import Batch, OptionTargets, StepReply, Targets
from hosl.run.allocator import return_freed_memory
from hosl.run.record import process_peak_bytes
from hosl.run.session import method_round
from hosl.run.torch_halves import DTYPES, make_client
from hosl.split import load_half


def alone_peak_bytes(config: Config, half: Path, rows: int, tokens: int, steps: int) -> int:
    """The most this process has had resident after `steps` steps of the config's method."""
    return_freed_memory()
    loaded: Any = load_half(half)
    loaded.convert(DTYPES[config.model.dtype])
    client = make_client(config, loaded)
    batch = fixed_batch(client, rows, tokens)
    for step in range(1, steps + 1):
        method_round(config, client, _NoServer(), batch, step)
    assert "grpc" not in sys.modules, "what is measured is a client without a network"
    return process_peak_bytes()


def fixed_batch(client: Any, rows: int, tokens: int) -> Batch:
    """The batch of every measured step: the longest there is, one scored token per row."""
    generator = np.random.Generator(np.random.Philox(key=0))
    vocabulary = client.half.config.get_text_config().vocab_size
    ids = generator.integers(3, vocabulary, (rows, tokens))
    last = np.full((rows, 1), tokens - 2, np.int32)
    mask = np.ones(ids.shape, np.int8)
    return Batch(ids, OptionTargets(mask, last, ids[:, -1:].astype(np.int32)))


class _NoServer:
    """Answers at once with made-up numbers: what a client takes by itself, to subtract."""

    def losses(self, activations: Sequence[Any], targets: Targets) -> list[float]:
        return [0.7 for _ in activations]

    def step(
        self, activations: Any, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        return StepReply(0.7, activations * 0 if want_gradient else None)

    def probe(self, pair: Any, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        return 0.7, 0.7

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """Nothing to do."""


if __name__ == "__main__":
    import msgspec

    settings, folder, *numbers = sys.argv[1:]
    known = parse_config(msgspec.json.decode(settings), where="the benchmark's")
    sys.stdout.write(f"{alone_peak_bytes(known, Path(folder), *map(int, numbers))}\n")
