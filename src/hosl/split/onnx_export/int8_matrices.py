"""int8 matrices of a half's blocks: the file that holds them, and what graphs do with them."""

from collections import Counter
from functools import lru_cache
from pathlib import Path

import onnx
import torch
from onnx import helper

from hosl.split.halves import ClientHalf
from hosl.split.onnx_export.block_functions import layers_named, rows_of
from hosl.split.quantised import quantise_rows
from hosl.split.reading.runtime_json import INT8_FILE
from hosl.split.reading.tensors import Source, write_tensors


def write_int8(folder: Path, half: ClientHalf) -> None:
    """Write the blocks' matrices as `quantise_` makes them, one at a time; GPT-2's transposed ones as [out, in], too.

    Raises:
        ModelError: if a weight is NaN or infinite.
    """
    blocks = half.model.get_submodule(half.blocks_name)
    names = [f"{half.blocks_name}.{name}" for name in layers_named(blocks)]

    @lru_cache(maxsize=1)  # both tensors of a layer are written one after the other
    def quantised(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = quantise_rows(rows_of(half.model.get_submodule(name)).detach(), name)
        return q, scale[:, None]

    sources = list[Source]()
    for name in names:
        shape = tuple(rows_of(half.model.get_submodule(name)).shape)
        sources.append(Source(f"{name}.weight", "I8", shape, lambda n=name: quantised(n)[0]))
        sources.append(Source(f"{name}.weight.scale", "F32", (shape[0], 1), lambda n=name: quantised(n)[1]))
    write_tensors(folder / INT8_FILE, sources)


def dequantise_(graph: onnx.GraphProto) -> None:
    """scale * float(q), with q an int8 input [out, in], becomes one DequantizeLinear, in place.

    Its other readers, casts that the backward pass multiplies otherwise, stay as they are.
    """
    int8 = {i.name for i in graph.input if i.type.tensor_type.elem_type == onnx.TensorProto.INT8}
    casts = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Cast" and n.input[0] in int8}
    before: dict[int, onnx.NodeProto] = {}
    for place, node in enumerate(graph.node):
        if node.op_type != "Mul" or node.input[0] not in casts:
            continue
        matrix = casts[node.input[0]]
        if node.input[1] != f"{matrix}.scale":
            continue
        flat = f"{matrix}.scale.flat"
        before[place] = helper.make_node("Squeeze", [node.input[1]], [flat])
        node.op_type = "DequantizeLinear"
        node.input[:] = [matrix, flat]
        node.attribute.append(helper.make_attribute("axis", 0))
    for place in sorted(before, reverse=True):
        graph.node.insert(place, before[place])
    _drop_unread_(graph)


def _drop_unread_(graph: onnx.GraphProto) -> None:
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(output.name for output in graph.output)
    for node in reversed(list(graph.node)):
        if not any(reads[name] for name in node.output):
            reads.subtract(node.input)
            graph.node.remove(node)
    for constant in list(graph.initializer):
        if not reads[constant.name]:
            graph.initializer.remove(constant)
