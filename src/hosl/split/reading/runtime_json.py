"""The content of onnx/runtime.json: the graphs of a client half, their inputs and digests. No torch, no engine.

    OUT/client/onnx/   runtime.json  prelude.onnx  block-KIND.onnx  block-KIND-gradient.onnx  ...

The graphs hold no weights: those are inputs, and come from the half's own file (`MappedWeights`). What each graph takes
and gives is in `hosl.split.onnx_export`, which writes this folder.
"""

from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from hosl.errors import ModelError
from hosl.split.reading.half_json import half_facts

FOLDER = "onnx"
"""The name of the graphs' folder in the client's."""
FILE = "runtime.json"
INT8_FILE = "base-int8.safetensors"
"""The frozen matrices of an int8 base, in the graphs' folder: NAME.weight int8 [out, in], NAME.weight.scale float32
[out, 1], by their names in the half."""
HIDDEN, HIDDEN_OUT, GRADIENT, D_HIDDEN = "hidden", "hidden_out", "gradient", "d.hidden"
"""The names, in all block graphs, of the block's input and output, dL/d output and dL/d input: [rows, seq, width]."""
TABLE, ROWS_OF_IDS = "table", "rows_of_ids"
"""The prelude's inputs of tokens: distinct rows of the token table [n, width], int64 [rows, seq] into them."""
STATES, LOGITS, D_STATES = "states", "logits", "d.states"
"""The head's input [scored, 1, width] and output [scored, vocabulary or classes], and dL/d input."""
SUM = "sum."
"""What stands before a weight's name in inputs to whose value a graph adds that weight's gradient."""
LORA_SCALE = "lora_scale"
"""The input of graphs with adapters that multiplies them: alpha / r, float32 without dimensions."""
FORMAT = 2

Variant: TypeAlias = str
"""block, gradient, gradient-sums, feedback; lora, lora-gradient, lora-feedback; int8, lora-int8, ..."""
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]


class BlockGraph(msgspec.Struct, frozen=True, kw_only=True):
    """A graph of a kind of block. It takes `hidden`, the kind's extras, `weights`, and what the variant adds."""

    file: str
    weights: tuple[str, ...]
    """The names within the block of the weights that the graph takes; of int8 matrices their scales, too."""
    gradients: tuple[str, ...] = ()
    """The names within the block of the weights whose gradients, `d.NAME`, it gives after `d.hidden`, in this order."""
    sums: tuple[str, ...] = ()
    """Those of them that it adds to inputs `sum.NAME`: `d.NAME` may be written over these."""


class PreludeGraph(msgspec.Struct, frozen=True, kw_only=True):
    """The graph of what stands before the blocks: embeddings, mask, rotary angles."""

    file: str
    inputs: tuple[str, ...]
    """Those of `input_ids`, `attention_mask` (int64 [rows, seq]), `rows_of_ids` and `table` that it takes."""
    weights: dict[str, str]
    """By input of the graph, the name of a parameter in the half; without the token table."""
    outputs: tuple[str, ...]
    """`hidden`, and what blocks are given beside it: `extra.0`, ..."""
    table: str | None
    """The name in the half of the token table, of which the graph is given the batch's rows."""


class BlockPlace(msgspec.Struct, frozen=True, kw_only=True):
    """One block of the half."""

    kind: str
    prefix: str
    """Its name in the half, such as model.layers.3."""
    extras: dict[str, str]
    """By input of its kind's graphs, the output of the prelude that it is given."""


class HeadGraph(msgspec.Struct, frozen=True, kw_only=True):
    """The graphs of the head of a client that keeps its labels."""

    file: str
    gradient_file: str
    """It takes `gradient`, dL/d logits, besides, and gives `d.states`, then `gradients`."""
    weights: tuple[str, ...]
    """The names of the weights that both take, by their names in the head's file."""
    tied: dict[str, str]
    """By input of the graphs, the parameter of the client half that is this weight, too."""
    gradients: tuple[str, ...]
    """The names of the weights whose gradients, `d.NAME`, it gives, in this order; not of tied ones."""


class LoraTargets(msgspec.Struct, frozen=True, kw_only=True):
    """The layers that the graphs with adapters adapt."""

    targets: tuple[str, ...]
    """The last parts of their names, such as q_proj."""


class RuntimeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The content of runtime.json."""

    format: int
    opset: int
    minimum_onnxruntime: str
    versions: dict[str, str]
    """The versions of hosl, torch, transformers, onnx and onnxruntime with which the graphs were made and checked."""
    client_digest: str
    """That of half.json: the weights that the graphs are for."""
    width: int
    """The last dimension of hidden states."""
    prelude: PreludeGraph
    kinds: dict[str, dict[Variant, BlockGraph]]
    blocks: tuple[BlockPlace, ...]
    head: HeadGraph | None = None
    """None: the labels are at the server."""
    lora: LoraTargets | None = None
    dtype: Dtype = "float32"
    """That of the blocks' matrices: as stored in the half's file, or int8, from `INT8_FILE`."""
    operators: dict[str, int]
    """How often each operator stands in the graphs: what an accelerator must know to run them."""
    files: dict[str, str]
    """By name of a file of the folder, its SHA-256."""
    beside: dict[str, str] = {}
    """The same of the client folder's own files that no other digest covers: config.json, the tokenizer's."""
    digest: str = ""
    """`content_digest` of all of the above."""


def content_digest(facts: RuntimeFacts) -> str:
    """The SHA-256 of what runtime.json says, but for its own `digest`."""
    return sha256(msgspec.json.encode(msgspec.structs.replace(facts, digest=""))).hexdigest()


def read_runtime_json(folder: Path, *, files: bool = True) -> RuntimeFacts:
    """The content of onnx/runtime.json of a client half's folder; if `files`, after the digests of all that it names.

    Raises:
        ModelError: if it is missing or damaged, of another version, for the weights of another split, or if a file that
            it names is not the one that was written.
        FolderError: if the folder is the server's half.
    """
    file = folder / FOLDER / FILE
    try:
        facts = msgspec.json.decode(file.read_bytes(), type=RuntimeFacts)
    except FileNotFoundError as cause:
        raise ModelError(
            f"{folder} has no graphs for an inference engine ({FOLDER}/{FILE}); `hosl split MODEL --cut K OUT "
            "--runtime onnx` makes them"
        ) from cause
    except (msgspec.DecodeError, OSError, RecursionError) as cause:
        raise ModelError(
            f"{file} is damaged, or was made by another version: {cause}; split the model again"
        ) from cause
    if facts.format != FORMAT:
        raise ModelError(
            f"{file} has format {facts.format}, this version reads {FORMAT}; split the model again"
        )
    half = half_facts(folder, "client")
    if facts.client_digest != half["client_digest"]:
        raise ModelError(
            f"{file} is of the client half {facts.client_digest[:12]}, half.json beside it of "
            f"{half['client_digest'][:12]}: graphs and weights are of different splits; copy the whole client "
            "folder again"
        )
    _check_whole(file, facts, half["cut"])
    if facts.digest != content_digest(facts):
        raise ModelError(
            f"{file} does not have its own digest: it was changed; copy the whole client folder again"
        )
    for place, digests in (file.parent, facts.files), (folder, facts.beside):
        for name, digest in digests.items() if files else ():
            _check_file(place, name, digest)
    return facts


def _check_whole(file: Path, facts: RuntimeFacts, cut: int) -> None:
    """Refuse parts that do not fit each other."""
    graphs = [facts.prelude, *(graph for variants in facts.kinds.values() for graph in variants.values())]
    files = [graph.file for graph in graphs]
    files += [facts.head.file, facts.head.gradient_file] if facts.head else []
    wrong = [f"no digest of {name}" for name in files if name not in facts.files]
    wrong += [
        f"{name!r} is no file's name"
        for name in (*facts.files, *facts.beside)
        if name != Path(name).name or name in ("", "..")
    ]
    if len(facts.blocks) != cut:
        wrong.append(f"{len(facts.blocks)} blocks, and half.json has {cut}")
    for block in facts.blocks:
        if "block" not in facts.kinds.get(block.kind, {}):
            wrong.append(f"no graph of kind {block.kind!r}")
        wrong += [
            f"the prelude has no {name!r}"
            for name in block.extras.values()
            if name not in facts.prelude.outputs
        ]
    if facts.prelude.outputs[:1] != (HIDDEN,):
        wrong.append(f"the prelude does not give {HIDDEN!r} first")
    if facts.dtype == "int8" and INT8_FILE not in facts.files:
        wrong.append(f"no digest of {INT8_FILE}")
    if wrong:
        raise ModelError(f"{file} is damaged: {wrong[0]}; split the model again")


def _check_file(folder: Path, name: str, digest: str) -> None:
    found = sha256()
    try:
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    except OSError as cause:
        raise ModelError(
            f"{folder / name} cannot be read: {cause.strerror}; copy the whole client folder again"
        ) from cause
    if found.hexdigest() != digest:
        raise ModelError(
            f"{folder / name} has the digest {found.hexdigest()[:12]}, {FILE} says {digest[:12]}: cut short, or of "
            "another split; copy the whole client folder again"
        )
