"""`hosl bench plan`: the planner's predictions against measurements, over families, cuts, methods and batches."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from hosl.bench.isolated_client import client_alone
from hosl.methods.variants import FORWARD, variants_called
from hosl.planner.machine import assumed_cpu, probed
from hosl.planner.model_shape import ModelShape, model_shape
from hosl.planner.plan import Question, of_config
from hosl.split import split_folder
from hosl.split.families import Head
from hosl.system.allocator import return_freed_memory

_DIRECTIONS = 2
_STEPS = 4
"""Timed steps, after one that warms up."""
_WIDTH = 512
_SIZES = {"hidden_size": _WIDTH, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 8000}
_MODELS: dict[str, tuple[Head, Any, dict[str, Any]]] = {
    "opt": ("causal", hf.OPTConfig, {**_SIZES, "ffn_dim": 2048, "word_embed_proj_dim": _WIDTH}),
    "llama": ("causal", hf.LlamaConfig, {**_SIZES, "intermediate_size": 1408, "num_key_value_heads": 4}),
    "gpt2": (
        "causal", hf.GPT2Config,
        {"n_embd": _WIDTH, "n_layer": 6, "n_head": 8, "vocab_size": 8000, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": ("classification", hf.BertConfig, {**_SIZES, "intermediate_size": 2048}),
}  # fmt: skip
_CASES = (
    ("frozen", 6, 32, 128), ("hosl", 2, 16, 64), ("hosl-gradient", 4, 32, 128), ("hosl-node", 3, 16, 128),
    ("fo-fo", 5, 8, 128), ("fo-recompute", 3, 16, 128), ("hosl-gradient, int8 + LoRA", 4, 8, 128),
)  # fmt: skip
"""(way, cut, rows, tokens) of the cases of each family."""


@dataclass(frozen=True)
class Case:
    """One configuration to predict and to measure."""

    family: str
    way: str
    """The name of a variant (`hosl.methods.variants`)."""
    cut: int
    rows: int
    tokens: int
    """Tokens per row."""


CASES = tuple(Case(family, *case) for family in _MODELS for case in _CASES)


def bench_plan(
    cases: tuple[Case, ...] = CASES, say: Callable[[str], None] = lambda text: None, *, probe_s: float = 10.0
) -> dict[str, Any]:
    """Predict and measure each case; each measurement has a process of its own.

    Returns:
        `methods`: a row per case with prediction, measurement and their ratio for client tensors, process, bytes and
        seconds. `worst`: the largest deviation from 1 of each ratio, and the share of cases whose tensors are within
        5 %.
    """
    return_freed_memory()  # as the measured client does: the system takes time for fresh pages
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        shapes = dict(_saved(Path(name), {case.family for case in cases}))
        base_bytes = _runtime_base_bytes(shapes, Path(name))
        for number, case in enumerate(cases, start=1):
            say(f"{number} of {len(cases)}: {case}")
            rows.append(_row(case, shapes[case.family], Path(name), base_bytes, probe_s))
    return {"runtime_base_bytes": round(base_bytes), "worst": _worst(rows), "methods": rows}


def _row(case: Case, shape: ModelShape, folder: Path, base_bytes: float, probe_s: float) -> dict[str, Any]:
    (variant,) = variants_called(case.way)
    config = variant.config(cut=case.cut, directions=_DIRECTIONS)
    question = Question(
        shape=shape, base=config, rows=case.rows, tokens=case.tokens, client=assumed_cpu(1), server=assumed_cpu(1),
        runtime_base_bytes=base_bytes,
    )  # fmt: skip
    planned = of_config(question)
    machine = probed(planned.client.work, config.zo.distribution, base=question.client, budget_s=probe_s)
    predicted_s = machine.seconds(
        planned.client.work, formed=planned.client.formed, updated=planned.client.updated
    )
    half = _client_half(folder, case.family, case.cut, shape)
    measured = client_alone(config, half, case.rows, case.tokens, _STEPS + 1)
    pairs = {
        "tensors": (planned.client.peak_bytes, measured["tensor_peak_bytes"]),
        "process": (planned.client_process_bytes, measured["process_peak_bytes"]),
        "bytes_up": (planned.traffic.bytes_up, measured["bytes_up"]),
        "bytes_down": (planned.traffic.bytes_down, measured["bytes_down"]),
        "seconds": (predicted_s, measured["client_s"]),
    }
    row: dict[str, Any] = {"name": f"{case.family}, {case.way}, cut {case.cut}, {case.rows} x {case.tokens}"}
    for key, (predicted, actual) in pairs.items():
        row |= {f"{key}_predicted": predicted, f"{key}_measured": actual, f"{key}_ratio": predicted / actual}
    return row


def _client_half(folder: Path, family: str, cut: int, shape: ModelShape) -> Path:
    """The folder of a saved model's client half at a cut; made once."""
    halves = folder / f"{family}-{cut}"
    if not halves.exists():
        labels = 2 if shape.head == "classification" else None
        split_folder(folder / family, cut, halves, head=shape.head, num_labels=labels)
    return halves / "client"


def _saved(folder: Path, families: set[str]) -> Iterator[tuple[str, ModelShape]]:
    """Save a random model of each family; yields (family, its shape as a plan reads it)."""
    for family in sorted(families):
        head, config_class, sizes = _MODELS[family]
        auto: Any = hf.AutoModelForCausalLM if head == "causal" else hf.AutoModelForSequenceClassification
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            auto.from_config(config_class(**sizes), trust_remote_code=False).save_pretrained(folder / family)
        yield family, model_shape(str(folder / family), head=head)


def _runtime_base_bytes(shapes: dict[str, ModelShape], folder: Path) -> float:
    """Bytes of this machine's Python with torch: the process of the smallest client less its tensors."""
    family, shape = next(iter(shapes.items()))
    half = _client_half(folder, family, 1, shape)
    config = FORWARD.config(cut=1, directions=1)
    smallest = client_alone(config, half, 1, 32, 2)
    return smallest["process_peak_bytes"] - smallest["tensor_peak_bytes"]


def _worst(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("tensors", "process", "bytes_up", "bytes_down", "seconds")
    deviations = {key: [abs(row[f"{key}_ratio"] - 1) for row in rows] for key in keys}
    within = sum(deviation <= 0.05 for deviation in deviations["tensors"])
    worst = {key: max(of_key) for key, of_key in deviations.items()}
    return worst | {"tensors_within_5_percent": within / len(rows)}
