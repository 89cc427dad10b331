"""Graphs that add gradients of matrices to sums that they are given, in place of giving them by themselves.

A device that goes through a batch in micro-batches then holds one set of gradients: an engine that is told to write an
output over the sum that came in does the addition inside the product.
"""

import onnx
from onnx import helper

from hosl.split.reading.runtime_json import SUM


def with_sums_(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Every gradient `d.NAME` that is a product A^T B becomes A^T B + `sum.NAME`, a new input; returns these names.

    The nodes are put in an order in which what gradients are made of can be let go of early (`_order_ends_`).
    """
    made = {output: node for node in graph.node for output in node.output}
    found = list[str]()
    for output in graph.output:
        product = made[output.name]
        left = made.get(product.input[0]) if output.name.startswith("d.") else None
        if product.op_type != "MatMul" or left is None or not _transposes(left):
            continue
        name = output.name.removeprefix("d.")
        product.op_type = "Gemm"
        product.input[:] = [left.input[0], product.input[1], f"{SUM}{name}"]
        product.attribute.append(helper.make_attribute("transA", 1))
        place = graph.input.add()
        place.CopyFrom(output)
        place.name = f"{SUM}{name}"
        found.append(name)
    _drop_unread_transposes_(graph)
    _order_ends_(graph)
    return tuple(found)


def _transposes(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute] == [[1, 0]]


def _drop_unread_transposes_(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.output[0] not in read:
            graph.node.remove(node)


def _order_ends_(graph: onnx.GraphProto) -> None:
    """Move the nodes that no other node reads, most of which make an output, to the end, the last of them first.

    ONNX Runtime computes what the last node of a file needs first. So a gradient of weights is there as soon as it can
    be, and what it was made of can go: in file order all of them came last. For a block of OPT that is 20 hidden states
    at once in place of 24, and 54 in place of 82 where rows are long (docs/log.md, 2026-11-29).
    """
    assert not any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute), (
        "it reads names, too"
    )
    read = {name for node in graph.node for name in node.input}
    ends = [node for node in graph.node if read.isdisjoint(node.output)]
    others = [node for node in graph.node if not read.isdisjoint(node.output)]
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*others, *reversed(ends))]
    del graph.node[:]
    graph.node.extend(ordered)
