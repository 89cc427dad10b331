"""The paper's memory table, planned: OPT-125M and OPT-1.3B shapes, cut 5, 64 rows, each task's longest batch.

    HOSL_DATA=... python research/paper_memory.py

Lengths are counted with OPT's tokenizer in $HOSL_DATA/data; memory is the planner's (docs/concepts/memory.md says how
well that agrees with measurements). Both ways of counting: the client half alone, and, as the authors' client did,
with the server half's weights and a second embedding in the same process.
"""

import os
import sys
from pathlib import Path

from hosl.config import Config, ModelConfig, ZOConfig
from hosl.methods.rows import ROWS
from hosl.planner.costs import client_memory
from hosl.planner.dry_run import storage_bytes
from hosl.planner.model_shape import ModelShape, model_shape
from hosl.tasks import PromptsConfig, TextTokenizer, load_task

CUT, ROWS_OF_BATCH = 5, 64
TASKS = ("SST-2", "CB", "RTE", "WiC", "WSC", "BoolQ")
WAYS = (
    "frozen", "hosl", "hosl-gradient", "hosl-node", "zo-zo", "fo-recompute, last block", "fo-recompute", "fo-fo, LoRA",
    "fo-fo", "fo-fo, AdamW", "hosl-gradient, bfloat16", "hosl-gradient, int8 + LoRA",
)  # fmt: skip
PAPER = {"opt-125m": (2.36, 8.67), "opt-1.3b": (7.23, 15.41)}
"""GiB of the client's GPU, hosl and fo-fo, BoolQ, second-hand (arXiv 2601.10940)."""


def longest_tokens(folder: Path, name: str) -> int:
    """Of a training row: prompt and right answer."""
    tokenizer = TextTokenizer.load(folder / "data" / "tokenizers" / "opt")
    config = PromptsConfig(name=name, folder=str(folder / "data" / "tasks" / name), max_tokens=2048)
    task = load_task(config, tokenizer, seed=0)
    return max(len(example.rows[example.label]) for example in task.train)


def static_of_the_rest(shape: ModelShape) -> int:
    """Bytes of the server half, its own copy of a tied embedding included."""
    _, server = shape.halves(CUT)
    return storage_bytes(server.parameters())


def peak_gib(way: str, shape: ModelShape, tokens: int) -> float:
    """Of the client's tensors in a step."""
    row = next(row for row in ROWS if row.name == way)
    config = row.applied(Config(model=ModelConfig(cut=CUT), zo=ZOConfig(directions=10)), cut=CUT)
    return client_memory(config, shape)(ROWS_OF_BATCH, tokens)[1] / 2**30


def main() -> None:
    """Print one table per shape."""
    folder = os.environ.get("HOSL_DATA")
    if not folder:
        sys.exit("HOSL_DATA is not set: it names the folder with data/tasks and data/tokenizers/opt")
    lengths = {name: longest_tokens(Path(folder), name) for name in TASKS}
    for name, (paper_hosl, paper_fo) in PAPER.items():
        shape = model_shape(name)
        rest = static_of_the_rest(shape) / 2**30
        print(
            f"\n{name}: client tensors in GiB; with the server half's weights beside them, {rest:.2f} GiB more\n"
        )
        print("| way | " + " | ".join(f"{task} ({tokens})" for task, tokens in lengths.items()) + " |")
        print("|---|" + "---|" * len(lengths))
        found = {way: [peak_gib(way, shape, tokens) for tokens in lengths.values()] for way in WAYS}
        for way, peaks in found.items():
            print(f"| {way} | " + " | ".join(f"{peak:.2f}" for peak in peaks) + " |")
        ratios = [fo / hosl for fo, hosl in zip(found["fo-fo"], found["hosl"], strict=True)]
        counted = [
            (fo + rest) / (hosl + rest) for fo, hosl in zip(found["fo-fo"], found["hosl"], strict=True)
        ]
        print("| **fo-fo over hosl** | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
        print("| the same with the server half | " + " | ".join(f"{ratio:.2f}" for ratio in counted) + " |")
        print(f"\nThe paper: {paper_fo} over {paper_hosl} = {paper_fo / paper_hosl:.2f} (BoolQ)")


if __name__ == "__main__":
    main()
