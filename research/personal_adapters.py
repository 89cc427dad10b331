"""CPU seconds of training steps of several clients with server adapters of their own: in one pass, against each alone.

    python research/personal_adapters.py [--shape opt-125m --cut 5]

All ways in one run, in turns: read the ratios. `together`: steps one after the other over one pass. `deltas`: what the
adapters add to one pass over the base, forward and backward. `rows differ`: the first client has twice the rows.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hosl.bench.merging import CROWDS, Crowd, cpu_seconds
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.core.targets import OptionTargets
from hosl.parties.engine.merging import Part, merged_losses
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.personal import AskedStep, PersonalServers
from hosl.split import LoraSpec, add_lora, load_half

ADAMW = OptimiserSpec(name="adamw")


def steps_of(crowd: Crowd, width: int, *, differ: bool) -> list[AskedStep]:
    """A training step of each client, which wants its gradient."""
    generator = torch.Generator().manual_seed(0)
    asked = []
    for client in range(crowd.clients):
        rows = crowd.rows * (2 if differ and client == 0 else 1)
        h = torch.randn((rows, crowd.tokens, width), generator=generator)
        positions = np.full((rows, 1), crowd.tokens - 2 - client % 4, np.int32)
        targets = OptionTargets(
            np.ones(h.shape[:2], np.int8), positions, np.full((rows, 1), 17 + client, np.int32)
        )
        asked.append(AskedStep(str(client), h, targets, 1, want_gradient=True))
    return asked


def base_pass(half: Any, asked: list[AskedStep]) -> None:
    """Forward and backward of all rows over the base alone."""
    leaves = [one.activations.detach().requires_grad_() for one in asked]
    losses = merged_losses(half, [Part(h, one.targets) for h, one in zip(leaves, asked, strict=True)])
    torch.stack(losses).sum().backward()


def measured(half: Any, base: Any, crowd: Crowd, repeats: int) -> dict[str, float]:
    """CPU seconds by way."""
    servers = PersonalServers(
        half, lambda h: FirstOrderServer(h, learning_rate=lambda step: 1e-4, optimiser=ADAMW)
    )
    for client in range(crowd.clients):
        servers.begin(str(client))
    width = half.config.get_text_config().hidden_size
    equal, unequal = (steps_of(crowd, width, differ=differ) for differ in (False, True))
    works = {
        "alone": lambda: [servers.steps([one]) for one in equal],
        "together": lambda: servers.steps(equal),
        "base": lambda: base_pass(base, equal),
        "differ alone": lambda: [servers.steps([one]) for one in unequal],
        "differ together": lambda: servers.steps(unequal),
    }
    return cpu_seconds(works, repeats)


def main() -> None:
    """Print a line for each crowd."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="opt-125m")
    parser.add_argument("--cut", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = random_halves(BenchSizes(options.shape, options.cut, 1, 1), Path(name)) / "server"
        half, base = load_half(folder), load_half(folder)
        add_lora(half, LoraSpec(), seed=0)
        for p in base.parameters():
            p.requires_grad_(False)
        print(
            f"{options.shape}, cut {options.cut}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
        )
        for crowd in CROWDS:
            s = measured(half, base, crowd, options.repeats)
            print(
                f"{crowd.name}: alone {s['alone']:.2f} s, together {s['together']:.2f} s, "
                f"{s['alone'] / s['together']:.2f} times; rows differ {s['differ alone'] / s['differ together']:.2f} "
                f"times; deltas and optimisers {s['together'] / s['base'] - 1:+.0%} of the base's pass"
            )


if __name__ == "__main__":
    main()
