"""A client half on the inference engine: mapped weights, adapters, and the graphs through which they go block by block.

Graphs hold no weights; one graph of each kind serves all blocks of that kind. The files and what each graph takes and
gives: `hosl.split.reading.runtime_json`.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hosl.errors import ConfigError, ModelError
from hosl.parties.edge.engine import Graph, engine_version, open_graph
from hosl.parties.edge.weights import MappedWeights
from hosl.split.families import FAMILIES
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.runtime_json import (
    D_HIDDEN,
    FOLDER,
    GRADIENT,
    HIDDEN,
    HIDDEN_OUT,
    INT8_FILE,
    LORA_SCALE,
    ROWS_OF_IDS,
    SUM,
    TABLE,
    BlockGraph,
    read_runtime_json,
)
from hosl.split.reading.seeded import seeded_generator
from hosl.split.specs import LoraSpec
from hosl.system.machine import process_bytes
from hosl.system.model_limits import check_row_length

_ADAPTER = re.compile(r"\.(lora_[AB])\.weight$")
_ADAPTER_IN_PEFT = r".\1.default.weight"
"""The name that peft, and so a checkpoint, gives an adapter's weight."""

Extras = Mapping[str, np.ndarray]
"""What blocks are given beside the hidden state, by the prelude's outputs: masks, rotary angles."""


@runtime_checkable
class Reads(Protocol):
    """A source of a half's weights: the half itself, or one that perturbs them."""

    def array(self, name: str) -> np.ndarray:
        """A parameter by its name in the half."""
        ...

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of a table, [len(indices), width]."""
        ...


@dataclass(frozen=True, slots=True)
class HalfConfig:
    """What is asked of a half's config.json."""

    num_labels: int
    """The classes of a classification head."""
    hidden_size: int
    """The width of the hidden state."""


class EdgeHalf:
    """Embeddings and blocks 0..cut-1 on the inference engine. `forward(ids, mask)` is the hidden state at the cut."""

    def __init__(
        self,
        folder: Path,
        *,
        adapters: LoraSpec | None = None,
        seed: int = 0,
        int8: bool = False,
        threads: int = 1,
    ) -> None:
        """Check the folder and map its weights. Graphs are opened when they are first needed.

        Args:
            folder: OUT/client of `hosl split --runtime onnx`.
            adapters: their rank, scale and layers; None: no adapters. They start as `hosl.split.add_lora` starts them.
            seed: the seed of the adapters' start.
            int8: whether the matrices of the blocks are read from the int8 base.
            threads: the engine's threads for one graph. Bits are the same for one and two.

        Raises:
            ConfigError: if the engine is not installed, or the graphs were split without these adapters or this base.
            ModelError: if graphs or weights are missing, damaged, of different splits, or need a newer engine.
            FolderError: if the folder is the server's half.
        """
        self.folder = folder
        self.before_bytes = process_bytes()
        """The memory that the process had resident before this half was opened."""
        self.facts = read_runtime_json(folder)
        facts = half_facts(folder, "client")
        check_engine(self.facts.minimum_onnxruntime)
        self.weights = MappedWeights(folder / "model.safetensors")
        if self.weights.digest() != facts["digest"]:
            raise ModelError(
                f"{folder}: the tensors do not have the digest of half.json; split the model again"
            )
        if int8 and self.facts.dtype != "int8":
            raise ConfigError(
                f"client.dtype: int8 needs graphs that were split for it, {folder} has {self.facts.dtype}; `hosl split "
                "--runtime onnx --client-dtype int8`, or leave client.dtype out"
            )
        self.base = MappedWeights(folder / FOLDER / INT8_FILE) if int8 else None
        self.family = FAMILIES.get((facts["family"], facts["head"]))
        """The names of the architecture's parts; None: it was cut by its structure, and they are not known."""
        self.cut = len(self.facts.blocks)
        self._content = _config_json(folder)
        self.config = HalfConfig(len(self._content.get("id2label") or "01"), self.facts.width)
        self._threads, self._graphs = threads, dict[str, Graph]()
        self._adapted = adapters is not None and self.cut > 0
        self.adapters: dict[str, np.ndarray] = {}
        """The adapters' weights by peft's names, in block order."""
        if adapters is not None and self.cut:
            self._add_adapters(adapters, seed)
            self._lora_scale = np.array(adapters.alpha / adapters.r, np.float32)

    def open_graphs(self) -> None:
        """Open the graphs of a forward pass now: a run that cannot have them is then refused before it begins.

        Raises:
            ConfigError, ModelError: as in `graph_facts` and `open_graph`.
        """
        self._graph(self.facts.prelude.file)
        for index in range(self.cut):
            self._graph(self.graph_facts(index).file)

    @property
    def norms_above(self) -> Mapping[str, tuple[str, ...]]:
        """By output projection, the norms between it and the block's output, from the projection up."""
        return self.family.norms_above if self.family and self.family.has_norms(self._content.get) else {}

    @property
    def norms_on_stream(self) -> tuple[str, ...]:
        """The norms of a block that the residual stream itself passes (post-LN), from the block's input up."""
        return self.family.norms_on_stream if self.family and self.family.has_norms(self._content.get) else ()

    def array(self, name: str) -> np.ndarray:
        """A parameter by its name in the half; of an int8 base int8, with its scales under NAME.scale."""
        if name in self.adapters:
            return self.adapters[name]
        if self.base is not None and name in self.base.stored:
            return self.base.array(name)
        return self.weights.array(name)

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of a table in float32, [len(indices), width]; read from the file unless the table is trained."""
        return self.weights.rows(name, indices)

    def trained_(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """These parameters in float32, to be written in place: what a later `array` gives is what was written."""
        return {
            name: self.adapters[name] if name in self.adapters else self.weights.trained_(name)
            for name in names
        }

    def forward(self, ids: np.ndarray, mask: np.ndarray, read: Reads | None = None) -> np.ndarray:
        """The hidden state at the cut, h = f_c(x) [rows, seq, width], float32.

        Args:
            ids: int64 [rows, seq].
            mask: int64 [rows, seq]; 0 is padding, on either side.
            read: the source of weights; None: the half's own.

        Raises:
            SplitError: if the rows are so long that rotary scaling would make them depend on each other.
        """
        hidden, extras = self.prelude(ids, mask, read)
        for index in range(self.cut):
            hidden = self.block(index, hidden, extras, self.block_weights(index, read=read))
        return hidden

    def prelude(
        self, ids: np.ndarray, mask: np.ndarray, read: Reads | None = None
    ) -> tuple[np.ndarray, Extras]:
        """The input of block 0 [rows, seq, width], and what the blocks are given beside it; see `forward`."""
        nested = self._content.get("text_config")
        text = nested if isinstance(nested, dict) else self._content
        check_row_length(text, str(self._content.get("model_type")), ids.shape[1])
        facts, read = self.facts.prelude, read or self
        inputs: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask}
        if facts.table is not None:
            distinct, places = np.unique(ids, return_inverse=True)
            inputs[ROWS_OF_IDS] = places.reshape(ids.shape).astype(np.int64, copy=False)
            inputs[TABLE] = read.rows(facts.table, distinct)
        inputs |= {place: read.array(name) for place, name in facts.weights.items()}
        found = self._graph(facts.file)(inputs)
        return found.pop(HIDDEN), found

    def block(
        self, index: int, hidden: np.ndarray, extras: Extras, weights: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The output of one block [rows, seq, width] from its input; `weights` are of `block_weights`."""
        graph = self._graph(self.graph_facts(index).file)
        return graph({HIDDEN: hidden, **self._extras(index, extras), **weights}, [HIDDEN_OUT])[HIDDEN_OUT]

    def differentiated(
        self,
        index: int,
        variant: str,
        hidden: np.ndarray,
        extras: Extras,
        weights: Mapping[str, np.ndarray],
        gradient: np.ndarray,
        *,
        wanted: Collection[str],
        to_input: bool,
        sums: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray | None, dict[str, np.ndarray]]:
        """The gradients of one block from that at its output [rows, seq, width]; the block is computed again.

        Args:
            index: the block.
            variant: `gradient` for exact gradients, `gradient-sums` if they are to be added to `sums`, or `feedback`
                for those of residual feedback.
            hidden: the block's input.
            extras: as the prelude gave them for these rows.
            weights: of `block_weights`, for this variant.
            gradient: dL/d output.
            wanted: the parameters whose gradients are wanted, by their names in the half.
            to_input: whether the gradient at the block's input is wanted.
            sums: by parameter, the sum that its gradient is added to in place; all of the graph's `sums`.

        Returns:
            The gradient at the input, or None; and those of the parameters without sums.
        """
        facts = self.graph_facts(index, variant)
        names = {self.parameter(index, name): f"d.{name}" for name in facts.gradients}
        asked = {name: names[name] for name in wanted if name in names}
        outputs = [*asked.values(), *([D_HIDDEN] if to_input else [])]
        if not outputs:
            return None, {}
        inputs = {HIDDEN: hidden, GRADIENT: gradient, **self._extras(index, extras), **weights}
        into = {names[name]: total for name, total in (sums or {}).items()}
        inputs |= {f"{SUM}{output.removeprefix('d.')}": total for output, total in into.items()}
        found = self._graph(facts.file)(inputs, outputs, into=into)
        return found.get(D_HIDDEN), {n: found[output] for n, output in asked.items() if output not in into}

    def block_weights(
        self, index: int, variant: str = "", read: Reads | None = None
    ) -> dict[str, np.ndarray]:
        """The weights of one block by the inputs of its graph; those stored in 16 bits are widened here."""
        read = read or self
        found = {
            name: read.array(self.parameter(index, name)) for name in self.graph_facts(index, variant).weights
        }
        return found | ({LORA_SCALE: self._lora_scale} if self._adapted else {})

    def parameters(self, index: int) -> list[str]:
        """The float parameters of one block by their names in the half, without adapters."""
        weights = self.facts.kinds[self.facts.blocks[index].kind]["block"].weights
        return [self.parameter(index, name) for name in weights]

    def parameter(self, index: int, name: str) -> str:
        """The name in the half of a weight of one block's graph; an adapter's is peft's."""
        return f"{self.facts.blocks[index].prefix}.{_ADAPTER.sub(_ADAPTER_IN_PEFT, name)}"

    def graph_facts(self, index: int, variant: str = "") -> BlockGraph:
        """The description of one block's graph.

        Raises:
            ConfigError: if the half was split without it.
        """
        name = "-".join(
            part for part in ("lora" * self._adapted, "int8" * (self.base is not None), variant) if part
        )
        variants = self.facts.kinds[self.facts.blocks[index].kind]
        if (name or "block") not in variants:
            raise ConfigError(
                f"the half in {self.folder} was split without the graph {name}, it has {', '.join(variants)}; split "
                "the model again with what this run needs (--lora-targets, --client-dtype), or leave that out"
            )
        return variants[name or "block"]

    def sums(self, index: int, variant: str, wanted: Collection[str]) -> dict[str, np.ndarray]:
        """Zeros for the parameters whose gradients the graph `variant-sums` adds up; none if it is not to be used.

        It is where the half was split with it, and all that it adds up is wanted.
        """
        variants = self.facts.kinds[self.facts.blocks[index].kind]
        facts = variants.get(f"{variant}-sums") if not self._adapted and self.base is None else None
        names = [self.parameter(index, name) for name in facts.sums] if facts else []
        if not names or not set(names) <= set(wanted):
            return {}
        return {name: np.zeros(self.weights.shape(name), np.float32) for name in names}

    def release(self, index: int) -> None:
        """Let go of the pages of one block's weights that the file can give again."""
        self.weights.release([name for name in self.parameters(index) if name in self.weights.stored])
        if self.base is not None:
            self.base.release(
                [n for n in self.base.stored if n.startswith(f"{self.facts.blocks[index].prefix}.")]
            )

    def _add_adapters(self, spec: LoraSpec, seed: int) -> None:
        targets = self.facts.lora.targets if self.facts.lora else ()
        if set(spec.target_modules or ()) != set(targets):
            raise ConfigError(
                f"client.lora.target_modules: {', '.join(spec.target_modules or ()) or 'null'}; the half in "
                f"{self.folder} was split for {', '.join(targets) or 'no adapters'}: name these, or `hosl split "
                "--runtime onnx --lora-targets ...` again"
            )
        for index in range(self.cut):
            facts = self.graph_facts(index)
            shapes = self._graph(facts.file).inputs
            for weight in facts.weights:
                if found := _ADAPTER.search(weight):
                    name, shape = self.parameter(index, weight), [size or spec.r for size in shapes[weight]]
                    self.adapters[name] = np.zeros(shape, np.float32)
                    if found[1] == "lora_A":  # Kaiming uniform with a = sqrt(5), as in peft
                        bound = 1 / math.sqrt(shape[1])
                        self.adapters[name][:] = seeded_generator(seed, name).uniform(-bound, bound, shape)

    def _graph(self, file: str) -> Graph:
        if file not in self._graphs:
            self._graphs[file] = open_graph(self.folder / FOLDER / file, threads=self._threads)
        return self._graphs[file]

    def _extras(self, index: int, extras: Extras) -> dict[str, np.ndarray]:
        return {place: extras[output] for place, output in self.facts.blocks[index].extras.items()}


def check_engine(minimum: str) -> None:
    """Refuse an engine that is older than graphs need.

    Raises:
        ConfigError: if it is not installed.
        ModelError: if it is older than `minimum`.
    """
    found = engine_version()
    if _numbers(found) < _numbers(minimum):
        raise ModelError(
            f"the graphs need onnxruntime {minimum} or newer, {found} is installed; `pip install --upgrade onnxruntime`"
        )


def in_slices(
    call: Callable[[slice, int], np.ndarray], slices: Sequence[slice], shape: Sequence[int]
) -> np.ndarray:
    """The batch of `shape` from `call(rows, number)` for each of its slices; of a single one, what it returned."""
    if len(slices) == 1:
        return call(slices[0], 0)
    whole = np.empty(shape, np.float32)
    for number, rows in enumerate(slices):
        whole[rows] = call(rows, number)
    return whole


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _config_json(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ModelError(f"{folder}/config.json cannot be read: {cause}; split the model again") from cause
    if not isinstance(content, dict):
        raise ModelError(f"{folder}/config.json holds no settings; split the model again")
    return content
