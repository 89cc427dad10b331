"""The graphs of a client half for an inference engine: prelude, and every kind of block with its gradient.

Files and runtime.json: `hosl.split.reading.runtime_json`. The graphs are made of shapes and constants alone; weights
are their inputs, and stay in the half's own file.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import onnx
import torch

from hosl.errors import SplitError
from hosl.split.halves import ClientHalf
from hosl.split.onnx_export.block_functions import BlockFunction, layers_named, layers_of
from hosl.split.onnx_export.checking import check_graph, random_like
from hosl.split.onnx_export.graph_files import OPSET, onnx_model, operators, write_graph
from hosl.split.onnx_export.head_functions import HeadFunction
from hosl.split.onnx_export.int8_matrices import write_int8
from hosl.split.onnx_export.kinds import kinds_of
from hosl.split.onnx_export.recording import (
    IDS,
    before_blocks,
    outputs,
    prelude,
    record,
    token_table,
)
from hosl.split.onnx_export.sums import with_sums_
from hosl.split.onnx_export.tracing import Sizes, Tensors, sizes_beside, traced, without_unused_
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.runtime_json import (
    FILE,
    FOLDER,
    FORMAT,
    GRADIENT,
    HIDDEN,
    LOGITS,
    LORA_SCALE,
    ROWS_OF_IDS,
    TABLE,
    BlockGraph,
    BlockPlace,
    Dtype,
    HeadGraph,
    LoraTargets,
    PreludeGraph,
    RuntimeFacts,
    Variant,
    content_digest,
)
from hosl.split.specs import GraphSpec
from hosl.system.readable import one_line

_MINIMUM_ONNXRUNTIME = "1.18"
"""The first that reads the graphs' opset and format."""
_GRAPHS_OF_A_HEAD = 2
_VERSIONS = ("hosl", "torch", "transformers", "onnx", "onnxruntime")


def export_graphs(
    half: ClientHalf,
    folder: Path,
    spec: GraphSpec,
    head: HeadFunction | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> RuntimeFacts:
    """Write `folder`/onnx: the graphs of a client half, and runtime.json; returns its content.

    Args:
        half: the half of `folder`, in any float dtype; its weights are not read.
        folder: a client's half, with half.json; without graphs.
        spec: the graphs to make beside those of plain weights.
        head: the head of a client that keeps its labels; None: it is at the server.
        say: is called with a line of progress before each graph.

    Raises:
        SplitError: if the family cannot be exported, saying why, or if no layer has a target's name.
        ModelError: if a weight is NaN or infinite, for which int8 has no scale.
    """
    graphs = folder / FOLDER
    graphs.mkdir()
    if spec.int8:
        write_int8(graphs, half)
    try:
        with torch.no_grad():
            graphs_of_half = _Graphs(half, graphs, spec, say)
            made = graphs_of_half.write(beside=0 if head is None else _GRAPHS_OF_A_HEAD)
            of_head = None if head is None else graphs_of_half.write_head(head)
    except OSError:
        raise  # of the disk
    except SplitError as refusal:
        raise SplitError(f"no graphs of this {half.family}: {refusal}") from refusal.__cause__
    except Exception as cause:  # tracing may raise any error about what a model's forward does
        raise SplitError(
            f"no graphs of this {half.family}: its forward pass cannot be traced "
            f"({one_line(f'{type(cause).__name__}: {cause}')}); run this client on torch"
        ) from cause
    facts = RuntimeFacts(
        format=FORMAT,
        opset=OPSET,
        minimum_onnxruntime=_MINIMUM_ONNXRUNTIME,
        versions={package: version(package) for package in _VERSIONS},
        client_digest=half_facts(folder, "client")["client_digest"],
        width=made.width,
        prelude=made.prelude,
        kinds=made.kinds,
        blocks=made.blocks,
        head=of_head,
        lora=LoraTargets(targets=tuple(sorted(spec.lora_targets))) if spec.lora_targets else None,
        dtype="int8" if spec.int8 else _stored(half),
        operators=dict(sorted(operators(graphs).items())),
        files=_digests(graphs.iterdir()),
        beside=_digests(file for file in folder.iterdir() if _is_beside(file)),
    )
    facts = msgspec.structs.replace(facts, digest=content_digest(facts))
    (graphs / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2))
    return facts


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def _is_beside(file: Path) -> bool:
    """Whether it is a file of the client's folder that no digest of half.json covers."""
    return file.is_file() and file.suffix != ".safetensors" and file.name != "half.json"


def _stored(half: ClientHalf) -> Dtype:
    """The dtype of the first matrix of the blocks, else of the half."""
    inside = half.model.get_submodule(half.blocks_name).parameters()
    weight = next((p for p in inside if p.dim() == 2), next(half.model.parameters()))
    name = str(weight.dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        raise SplitError(f"its weights are stored as {name}; convert them to float32 or bfloat16")
    return cast(Dtype, name)


@dataclass(frozen=True, slots=True)
class _Made:
    """What runtime.json says of the graphs."""

    width: int
    prelude: PreludeGraph
    kinds: dict[str, dict[Variant, BlockGraph]]
    blocks: tuple[BlockPlace, ...]


class _Graphs:
    """The graphs of one half, and the folder that they are written to."""

    def __init__(self, half: ClientHalf, folder: Path, spec: GraphSpec, say: Callable[[str], None]) -> None:
        self._half, self._folder, self._spec, self._say = half, folder, spec, say
        self._written, self._all, self._begin = 0, 0, time.monotonic()
        self._sizes = sizes_beside(_taken(half))
        self._others = Sizes(*(size + 1 for size in self._sizes.names))
        """Of the batch that graphs are tried with."""
        self._recording = record(half, self._sizes.batch())
        self._checked = record(half, self._others.batch())
        self._width = self._recording.hidden.shape[-1]

    def write(self, *, beside: int) -> _Made:
        """Write all graphs but those of a head, of which there are `beside`."""
        blocks: Any = self._half.model.get_submodule(self._half.blocks_name)
        functions = [
            BlockFunction(block, call, layers=layers_of(self._half, block))
            for block, call in zip(blocks, self._recording.calls, strict=False)
        ]
        if self._spec.lora_targets:
            self._check_targets([layers_named(function.block) for function in functions])
        kinds = kinds_of(functions, self._sizes, self._width)
        of_kind = dict(zip(kinds, functions, strict=True))
        self._all = 1 + beside + sum(len(list(self._variants(function))) for function in of_kind.values())
        made: dict[str, dict[Variant, BlockGraph]] = {}
        extras: dict[str, tuple[str, ...]] = {}
        for index, (kind, function) in enumerate(zip(kinds, functions, strict=True)):
            if kind not in made:
                calls = zip(function.extras, self._checked.calls[index].tensors, strict=True)
                made[kind], extras[kind] = self._kind(kind, function, dict(calls))
        names = {id(tensor): name for name, tensor in outputs(self._recording).items()}
        places = tuple(
            BlockPlace(
                kind=kind,
                prefix=f"{self._half.blocks_name}.{index}",
                extras={
                    name: names[id(tensor)]
                    for name, tensor in zip(function.extras, function.call.tensors, strict=True)
                    if name in extras[kind]
                },
            )
            for index, (kind, function) in enumerate(zip(kinds, functions, strict=True))
        )
        given = {name for place in places for name in place.extras.values()}
        front = self._prelude(tuple(name for name in names.values() if name == HIDDEN or name in given))
        return _Made(self._width, front, made, places)

    def write_head(self, function: HeadFunction) -> HeadGraph:
        """Write the graphs of the head, and of its gradient."""
        examples = function.examples(self._sizes, self._width)
        taken, _ = self._write("head.onnx", function.forward, examples, {})
        examples[GRADIENT] = torch.zeros_like(function.forward(examples)[LOGITS])
        _, given = self._write("head-gradient.onnx", function.gradient, examples, {}, taken)
        weights = [name for name in function.weights if name in taken]
        return HeadGraph(
            file="head.onnx",
            gradient_file="head-gradient.onnx",
            weights=tuple(name for name in weights if name not in function.tied),
            tied={name: function.tied[name] for name in weights if name in function.tied},
            gradients=tuple(d.removeprefix("d.") for d in given[1:]),
        )

    def _kind(
        self, kind: str, function: BlockFunction, checked: Tensors
    ) -> tuple[dict[Variant, BlockGraph], tuple[str, ...]]:
        """Write the graphs of one kind of block, and try them; the graphs, and the extras that all of them take.

        `checked` is what the block is called with by the batch that they are tried with.
        """
        found: dict[Variant, BlockGraph] = {}
        kept = [HIDDEN, GRADIENT, LORA_SCALE]
        for variant, of, compute in self._variants(function):
            examples = of.examples(self._sizes, self._width)
            if variant.endswith(("gradient", "feedback")):
                examples[GRADIENT] = torch.zeros_like(examples[HIDDEN])
            name = f"block-{kind}.onnx" if variant == "block" else f"block-{kind}-{variant}.onnx"
            taken, given = self._write(name, compute, examples, checked, kept)
            if variant == "block":
                kept += [extra for extra in of.extras if extra in taken]
            found[variant] = BlockGraph(
                file=name,
                weights=tuple(w for w in of.weights if w in taken),
                gradients=tuple(d.removeprefix("d.") for d in given[1:]),
            )
            if variant == "gradient":
                found[f"{variant}-sums"] = self._summing(found[variant])
        return found, tuple(kept)

    def _summing(self, plain: BlockGraph) -> BlockGraph:
        """Write the graph that adds the gradients of matrices to what it is given."""
        model = onnx.load(self._folder / plain.file)
        sums, file = with_sums_(model.graph), plain.file.replace(".onnx", "-sums.onnx")
        onnx.checker.check_model(model)
        write_graph(self._folder / file, model)
        return msgspec.structs.replace(plain, file=file, sums=sums)

    def _variants(
        self, plain: BlockFunction
    ) -> Iterator[tuple[Variant, BlockFunction, Callable[[Tensors], Tensors]]]:
        """The functions of a block that get a graph."""
        linear = layers_named(plain.block)
        yield "block", plain, plain.forward
        bases = {"": plain} | ({"int8": replace(plain, quantised=linear)} if self._spec.int8 else {})
        for base, function in bases.items():
            if base:
                yield base, function, function.forward
            else:
                yield "gradient", function, function.gradient
                if function.fed_back:
                    yield "feedback", function, function.feedback
            if not self._spec.lora_targets:
                continue
            adapted = replace(function, adapted=self._adapted(linear))
            name = f"lora-{base}" if base else "lora"
            yield name, adapted, adapted.forward
            yield f"{name}-gradient", adapted, adapted.gradient
            if adapted.fed_back:
                yield f"{name}-feedback", adapted, adapted.feedback

    def _adapted(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a block's layers that are targets."""
        return tuple(name for name in layers if name.rpartition(".")[2] in self._spec.lora_targets)

    def _check_targets(self, blocks: Sequence[tuple[str, ...]]) -> None:
        """Refuse targets before any graph is made: a name that no block has, a block that has none of them.

        Raises:
            SplitError: naming it, and the layers that there are.
        """
        there = {name.rpartition(".")[2] for layers in blocks for name in layers}
        missing = [name for name in self._spec.lora_targets if name not in there]
        if missing or not all(map(self._adapted, blocks)):
            raise SplitError(
                f"--lora-targets {','.join(missing or self._spec.lora_targets)}: a block has no such layer; there are "
                f"{', '.join(sorted(there))}"
            )

    def _prelude(self, wanted: tuple[str, ...]) -> PreludeGraph:
        """Write the graph of what stands before the blocks, with these outputs."""
        weights = before_blocks(self._half)
        table = token_table(self._half)
        parameters = dict(self._half.named_parameters())
        rows = torch.zeros(self._sizes.distinct, parameters[table].shape[1])
        batch, other = self._sizes.batch(), self._others.batch()
        examples = batch | {ROWS_OF_IDS: batch[IDS].clone(), TABLE: rows}
        other |= {ROWS_OF_IDS: torch.arange(other[IDS].numel()).view_as(other[IDS]) % self._others.distinct}
        inputs = tuple(examples)
        examples |= {name: torch.zeros(parameters[name].shape) for name in weights}

        def compute(tensors: Tensors) -> Tensors:
            found = outputs(prelude(self._half, weights, tensors))
            return {name: found[name] for name in wanted}

        taken, given = self._write("prelude.onnx", compute, examples, other)
        return PreludeGraph(
            file="prelude.onnx",
            inputs=tuple(name for name in inputs if name in taken),
            weights={name: name for name in weights if name in taken},
            outputs=given,
            table=table,
        )

    def _write(
        self,
        name: str,
        compute: Callable[[Tensors], Tensors],
        examples: Tensors,
        checked: Tensors,
        keep: Collection[str] = (),
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Write one graph, and try it; returns the names of its inputs, unused ones only if to `keep`, and outputs.

        It is tried on the values `checked`, and on random ones where there are none.
        """
        self._tell(name)
        graph, given = traced(compute, examples)
        taken = without_unused_(graph, examples, keep)
        values = random_like(examples, self._sizes, self._others, checked)
        inputs = {name: examples[name] for name in taken}
        write_graph(self._folder / name, onnx_model(graph, inputs, values, given, self._sizes))
        check_graph(self._folder / name, compute, values)
        self._written += 1
        return taken, given

    def _tell(self, name: str) -> None:
        """Say which graph is next, and for how long the rest goes on if all take as long as those before."""
        left_s = (time.monotonic() - self._begin) / max(self._written, 1) * (self._all - self._written)
        left = f", about {left_s:.0f} s left" if self._written else ""
        self._say(f"graph {self._written + 1} of {self._all}: {name}{left}")


def _taken(half: ClientHalf) -> set[int]:
    """The sizes that occur in a half, and the numbers of its config, such as heads and groups."""
    tensors = (*half.model.parameters(), *half.model.buffers())
    numbers = half.config.get_text_config().to_dict().values()
    return {size for t in tensors for size in t.shape} | {n for n in numbers if type(n) is int}
