"""The memory of a client on the inference engine, predicted from shapes alone. No torch: a device checks its budget.

A process takes a base, pages of the half's files, and pages of its own. With u one hidden state [rows, seq, width] in
float32, f as much of a feed-forward layer, s a micro-batch's attention scores [rows, heads, seq, seq], m its mask
[rows, 1, seq, seq], W one block's weights and dW the gradients of those that are trained:

    files      the weights of one block that are only read: they are let go of once it was computed
    own        W of every trained block, and the largest of
               frozen      u + F
               probes      3u + F + one block's shifted W and its random bits; with a returned gradient 4u
               gradients   a kept u per block from the lowest trained one on but block 0, u (dL/dh), dW of one block, B
               feedback    the same u, or one that the others are made of again; max(F, f + dW), sums of dW beside it
               int8        F with the largest matrix in float32, B with two
    F          max(2u + f, or but for ReLU u + 2f, or of gated layers u + 3f;  u + 3s + m)
    B          max(7u + 3f, or but for ReLU 3.5f, or of gated layers 7.5f, + s;  6u + 4s + m)
    B, LoRA    max(4u + 3f or as above + s;  5.5u + 3s + m)

F and B are what ONNX Runtime 1.32 holds at once for the graphs of `hosl.split.onnx_export`, fitted to the peaks of
blocks of four families at 16 to 1,024 tokens a row (docs/log.md, 2026-11-29): the larger of the feed-forward layers'
moment and that of attention counts. Held against processes by `hosl bench memory --runtime onnx`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.parties.edge.clients import recomputing, residual
from hosl.parties.micro_batches import row_slices
from hosl.split.families import FAMILIES
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.runtime_json import read_runtime_json
from hosl.system.safetensors_file import stored_tensors

_BASE_OWN_BYTES, _BASE_FILE_BYTES = 45.0 * 2**20, 60.0 * 2**20
EDGE_BASE_BYTES = _BASE_OWN_BYTES + _BASE_FILE_BYTES
"""Python, the modules of `hosl join`, ONNX Runtime with opened graphs, before any weight: measured on x86-64 with
Python 3.11 and onnxruntime 1.32."""
_FLOAT = 4
"""Bytes of a number that the engine computes with."""
_BITS = {"gaussian": 2.0, "sphere": 2.0, "rademacher": 1 / 8, "low-rank": 0.0}
"""Bytes of random bits per element, drawn once for both signs of a probe (`hosl.core.directions.drawn`)."""
_USUALLY_ADAPTED = 2
"""Square matrices of a block with adapters, where the layers are peft's choice."""


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """The largest resident size of a client's process, by kind of page."""

    own_bytes: float
    """Beside the base, pages of the process's own: trained weights, activations, gradients, scratch."""
    read_bytes: float
    """Pages of the half's files: weights that are only read."""

    @property
    def base_bytes(self) -> float:
        """Python, the modules of `hosl join` and the engine, before any weight."""
        return EDGE_BASE_BYTES

    @property
    def tensor_bytes(self) -> float:
        """All but the base."""
        return self.own_bytes + self.read_bytes

    @property
    def anonymous_bytes(self) -> float:
        """Pages of the process's own (RssAnon)."""
        return _BASE_OWN_BYTES + self.own_bytes

    @property
    def file_bytes(self) -> float:
        """Pages of files, the code among them (RssFile). The system may drop them and read them again."""
        return _BASE_FILE_BYTES + self.read_bytes

    @property
    def process_bytes(self) -> float:
        """The peak of the process (VmHWM)."""
        return EDGE_BASE_BYTES + self.tensor_bytes


@dataclass(frozen=True, slots=True)
class StoredShape:
    """The shape of a weight, and the bytes of its numbers in the half's file."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def numbers(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class EdgeShape:
    """A client half as its memory depends on it."""

    width: int
    """Of hidden states."""
    heads: int
    """Of attention."""
    relu: bool
    """Whether the feed-forward layers are computed in place: their activation is ReLU."""
    blocks: tuple[Mapping[str, StoredShape], ...]
    """The parameters of each block by their names in it."""
    before: Mapping[str, StoredShape]
    """The parameters before block 0, the token table among them."""
    projections: tuple[str, ...] = ()
    """The names in a block of the layers, and of the norms above them, that residual feedback trains."""

    def of_blocks(self, count: int) -> "EdgeShape":
        """The same half with its first blocks only."""
        return replace(self, blocks=self.blocks[:count])

    @property
    def bytes(self) -> int:
        """The size of all parameters in the file."""
        return sum(p.numbers * p.itemsize for part in (*self.blocks, self.before) for p in part.values())


def planned_process_bytes(
    config: Config, folder: Path, rows: int, tokens: int, *, evaluation: bool = False
) -> PlannedMemory:
    """The memory that a client of `make_edge_client(config, folder)` takes for a step on a batch [rows, tokens].

    Args:
        config: method, trainable set, dtype, micro-batch and distribution are read.
        folder: OUT/client of `hosl split --runtime onnx`; only runtime.json and the headers of its files are read.
        rows: rows of the batch; a candidate answer is a row.
        tokens: tokens per row of the longest batch.
        evaluation: a forward pass between two steps, beside all that training holds, in place of a step.

    Raises:
        ModelError: as in `read_runtime_json`.
        FolderError: if the folder is the server's half.
    """
    return planned_memory(config, shape_in(folder), rows, tokens, evaluation=evaluation)


def shape_in(folder: Path) -> EdgeShape:
    """The shape of the half in a folder; raises as `planned_process_bytes`."""
    facts, half = read_runtime_json(folder, files=False), half_facts(folder, "client")
    stored = {
        name: StoredShape(tensor.shape, tensor.numpy_dtype.itemsize)
        for name, tensor in stored_tensors(folder / "model.safetensors").items()
    }
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return edge_shape(
        stored, [block.prefix for block in facts.blocks], content, facts.width, (half["family"], half["head"])
    )


def edge_shape(
    parameters: Mapping[str, StoredShape],
    prefixes: Sequence[str],
    content: Mapping[str, Any],
    width: int,
    family: tuple[str, Any],
) -> EdgeShape:
    """The shape of a half.

    Args:
        parameters: all of the half, by name.
        prefixes: the name of each block in the half.
        content: that of config.json.
        width: of hidden states.
        family: model type and head.
    """
    nested = content.get("text_config")
    content = nested if isinstance(nested, dict) else content
    heads = (content.get(name) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads"))
    activations = (content.get(name) for name in ("activation_function", "hidden_act", "activation"))
    row = FAMILIES.get(family)
    norms = [norm for above in row.norms_above.values() for norm in above] if row else []
    blocks = tuple(
        {n.removeprefix(f"{prefix}."): p for n, p in parameters.items() if n.startswith(f"{prefix}.")}
        for prefix in prefixes
    )
    inside = tuple(f"{prefix}." for prefix in prefixes)
    return EdgeShape(
        width=width,
        heads=next((number for number in heads if isinstance(number, int)), max(width // 64, 1)),
        relu="relu" in activations,
        blocks=blocks,
        before={name: p for name, p in parameters.items() if not (inside and name.startswith(inside))},
        projections=(*row.output_projections, *norms) if row else (),
    )


def planned_memory(
    config: Config, half: EdgeShape, rows: int, tokens: int, *, evaluation: bool = False
) -> PlannedMemory:
    """`planned_process_bytes` of a half whose shape is known."""
    trained = [_trained_bytes(config, half, index) for index in range(len(half.blocks))]
    before = 0.0
    if config.method_row.trains == "chosen" and config.client.trainable == "all":
        before = float(sum(p.numbers for p in half.before.values())) * _FLOAT
    held = (before + sum(trained)) * (1 + _state_copies(config))
    step = _Step(config, half, rows, tokens, trained, before)
    worst = max(step.clean() if evaluation else step.moments(), key=lambda moment: moment.bytes)
    return PlannedMemory(
        own_bytes=held + worst.own_bytes, read_bytes=worst.read_bytes + _front_bytes(half, tokens)
    )


def _state_copies(config: Config) -> int:
    """How many numbers an optimiser keeps of each trained weight."""
    optimiser = config.client.optimiser
    if "client.optimiser" not in config.method_row.reads:
        return 0
    return 2 if optimiser.name == "adamw" else int(optimiser.momentum > 0)


@dataclass(frozen=True, slots=True)
class _Moment:
    """What one moment of a step takes beside trained weights and their optimiser's state."""

    own_bytes: float
    read_bytes: float

    @property
    def bytes(self) -> float:
        """Both kinds of pages."""
        return self.own_bytes + self.read_bytes


class _Step:
    """The activations, gradients and scratch of one step; see the head of this file."""

    def __init__(
        self,
        config: Config,
        half: EdgeShape,
        rows: int,
        tokens: int,
        trained: Sequence[float],
        before: float,
    ) -> None:
        self._config, self._half, self._rows, self._tokens = config, half, rows, tokens
        self._trained, self._before = trained, before
        self._lowest = next((index for index, moved in enumerate(trained) if moved), len(trained))
        self._u = float(rows * tokens * half.width * _FLOAT)

    def moments(self) -> list[_Moment]:
        """The moments of the step that may be its worst."""
        method = self._config.method_row
        if method.backward == "blocks" or method.keeps_by_blocks:
            return self._of_gradients()
        return [*self.clean(), *self._of_probes()] if method.trains == "chosen" else self.clean()

    def clean(self) -> list[_Moment]:
        """The moment of a forward pass that keeps nothing."""
        return self._passing(self._u, *self._slices(1))

    def _passing(self, held: float, at_once: int, parts: int) -> list[_Moment]:
        """The two moments of a block's forward pass beside what is held: in its feed-forward layers, and in attention.

        A block's pages are let go of after it, so in the first micro-batch's attention those of the feed-forward layers
        are not there yet.
        """
        layers, attention = (
            held + (self._u if parts > 1 else 0.0) + inside for inside in self._inside(at_once)
        )
        blocks = range(len(self._trained))
        early = _before_feed_forward(self._half) if parts == 1 else 1.0
        second = self._with_weights(attention, blocks)
        return [
            self._with_weights(layers, blocks),
            _Moment(second.own_bytes, second.read_bytes * early),
        ]

    def _with_weights(self, own: float, blocks: Iterable[int], *, twice: bool = False) -> _Moment:
        """A moment at the worst of some blocks: with its weights that are only read, and their float32 copies.

        `twice`: a gradient's graph holds two widened matrices of an int8 base.
        """
        weights = [_read_bytes(self._config, self._half, index, self._trained[index]) for index in blocks]
        widened, read = max(weights, key=sum, default=(0.0, 0.0))
        copies = 2 if twice and self._config.client.dtype == "int8" else 1
        return _Moment(own + copies * widened, read)

    def _of_probes(self) -> list[_Moment]:
        scratch = max(*self._trained, self._before, 0.0)
        bits = scratch / _FLOAT * _BITS[self._config.zo.distribution]
        held = 4 if self._config.method_row.wants_gradient else 3
        beside = held * self._u + scratch + bits
        projecting = [self._with_weights(beside + 3 * self._u, ())] if held == 4 else []
        return [*self._passing(beside, *self._slices(1)), *projecting]

    def _of_gradients(self) -> list[_Moment]:
        feedback, blocks = self._config.method_row.keeps_by_blocks, range(len(self._trained))
        lora = self._config.client.trainable == "lora"
        at_once, parts = self._slices(residual.EVALUATIONS if feedback else recomputing.EVALUATIONS)
        inputs = len(blocks) - (self._lowest if feedback else max(self._lowest, 1))
        if feedback and inputs and self._stream_alone():
            inputs = 1
        held = max(inputs, 1) * self._u
        moved = max(self._trained, default=0.0)
        passes = self._feedback(at_once, moved) if feedback else self._backward(at_once, adapters=lora)
        sums = moved if not feedback or parts > 1 else 0.0
        return [
            *self._passing(held, at_once, parts),
            self._with_weights(held + self._u + passes + sums, blocks[self._lowest :], twice=not feedback),
        ]

    def _stream_alone(self) -> bool:
        chosen = self._config.residual.kept
        if chosen != "auto":
            return chosen == "stream"
        return (len(self._trained) - self._lowest) * self._u > residual.AFFORDABLE * self._half.bytes

    def _slices(self, evaluations: int) -> tuple[int, int]:
        """The rows of a micro-batch, and the number of them."""
        found = row_slices((self._rows, self._tokens), evaluations, self._config.client.micro_batch_size)
        return found[0].stop - found[0].start, len(found)

    def _inside(self, at_once: int) -> tuple[float, float]:
        """F of one micro-batch, output included: in the feed-forward layers, and in attention."""
        u, f, s, m = self._sizes(at_once)
        gated = _feed_forward(self._half)[1]
        layers = u + 3 * f if gated else (2 * u + f if self._half.relu else u + 2 * f)
        return layers, u + 3 * s + m

    def _backward(self, at_once: int, *, adapters: bool) -> float:
        """B, without the gradients themselves."""
        u, f, s, m = self._sizes(at_once)
        gated = _feed_forward(self._half)[1]
        layers = 4 * u + (7.5 if gated else 3.0 if self._half.relu else 3.5) * f + s
        if adapters:
            return max(layers, 5.5 * u + 3 * s + m)
        return max(layers + 3 * u, 6 * u + 4 * s + m)

    def _feedback(self, at_once: int, gradients: float) -> float:
        """What a block's graph of residual feedback holds, its gradients among it."""
        return max(*self._inside(at_once), self._sizes(at_once)[1] + gradients)

    def _sizes(self, at_once: int) -> tuple[float, float, float, float]:
        """u, f, s and m of one micro-batch."""
        seq = self._tokens
        u = float(at_once * seq * self._half.width * _FLOAT)
        f = float(at_once * seq * _feed_forward(self._half)[0] * _FLOAT)
        m = float(at_once * seq * seq * _FLOAT)
        return u, f, m * self._half.heads, m


def _feed_forward(half: EdgeShape) -> tuple[int, bool]:
    """The width of the feed-forward layers, and whether they are gated.

    They are the matrices between the width of hidden states and the largest number that two of them have; a gate and
    the layer beside it may be one matrix of twice as many rows.
    """
    others = [
        max(p.shape) for block in half.blocks[:1] for p in block.values() if len(p.shape) == 2
    ]  # fmt: skip
    widest = [n for n in others if others.count(n) > 1 or 2 * n in others]
    if not widest:
        return 4 * half.width, False
    f = max(n for n in widest if 2 * n in others or 2 * n not in widest)
    return f, others.count(f) > 2 or 2 * f in others


def _before_feed_forward(half: EdgeShape) -> float:
    """The share of a block's weights that is not in its feed-forward layers."""
    f = _feed_forward(half)[0]
    block = half.blocks[0].values() if half.blocks else ()
    inside = sum(p.numbers for p in block if len(p.shape) == 2 and max(p.shape) in (f, 2 * f))
    return 1.0 - inside / max(sum(p.numbers for p in block), 1)


def _trained_bytes(config: Config, half: EdgeShape, index: int) -> float:
    """The bytes of one block's trained numbers, which have pages of the process's own."""
    method, block, which = config.method_row, half.blocks[index], config.client.trainable
    last = index >= len(half.blocks) - config.trained_blocks if method.needs_blocks else True
    if method.trains == "nothing" or not last:
        return 0.0
    if which == "lora":
        return float(_adapter_numbers(config, block)) * _FLOAT
    projections = tuple(f"{name}." for name in half.projections)
    if method.needs_blocks or which == "output-projections":
        chosen: Iterable[StoredShape] = [p for name, p in block.items() if name.startswith(projections)]
    elif which == "last-block" and index < len(half.blocks) - 1:
        chosen = []
    else:
        chosen = block.values()
    return float(sum(p.numbers for p in chosen)) * _FLOAT


def _adapter_numbers(config: Config, block: Mapping[str, StoredShape]) -> int:
    targets = config.client.lora.target_modules
    matrices = {name.removesuffix(".weight"): p.shape for name, p in block.items() if len(p.shape) == 2}
    if targets is None:
        return (
            sum(2 * min(shape) for shape in list(matrices.values())[:_USUALLY_ADAPTED]) * config.client.lora.r
        )
    adapted = [shape for name, shape in matrices.items() if name.rpartition(".")[2] in targets]
    return sum(map(sum, adapted)) * config.client.lora.r


def _read_bytes(config: Config, half: EdgeShape, index: int, trained: float) -> tuple[float, float]:
    """The bytes of one block's weights that are only read: of their float32 copies, and of the pages of their file.

    There is a copy of what is stored in 16 bits, and of an int8 base one matrix after the other.
    """
    block = half.blocks[index]
    if config.client.dtype == "int8":
        matrices = [p.numbers for p in block.values() if len(p.shape) == 2]
        others = sum(p.numbers * p.itemsize for p in block.values() if len(p.shape) != 2)
        return float(max(matrices, default=0)) * _FLOAT, float(sum(matrices) + others)
    if config.client.trainable == "lora":  # beside the block's own weights
        trained = 0.0
    narrow = float(sum(p.numbers for p in block.values() if p.itemsize < _FLOAT)) * _FLOAT
    whole = float(sum(p.numbers * p.itemsize for p in block.values()))
    return max(narrow - trained, 0.0), max(whole - trained, 0.0)


def _front_bytes(half: EdgeShape, tokens: int) -> float:
    """The bytes of what stands before the blocks: of tables only the rows that are read, the token table's by copy."""
    return float(sum(min(p.numbers, tokens * half.width) * p.itemsize for p in half.before.values()))
