"""Traced graphs as ONNX files: the same bytes for the same graph, no path or source line of the machine in them."""

import logging
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import onnxscript  # noqa: F401  (torch's exporter imports it late; its absence is told at once)
import torch

from hosl.errors import SplitError
from hosl.split.onnx_export.int8_matrices import dequantise_
from hosl.split.onnx_export.tracing import Sizes, Tensors
from hosl.system.readable import one_line

OPSET = 20


def onnx_model(
    graph: torch.fx.GraphModule, examples: Tensors, others: Tensors, outputs: Collection[str], sizes: Sizes
) -> onnx.ModelProto:
    """The ONNX model of a traced graph, whose inputs are `examples`, in this order.

    A dimension in which `others` differ stays open, and has its name by `sizes`.

    Raises:
        SplitError: if an operator has no ONNX form in the default domain.
    """
    open_sizes = tuple(
        {i: torch.export.Dim.AUTO for i, size in enumerate(t.shape) if size != others[name].shape[i]}
        for name, t in examples.items()
    )
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each package that it could also export
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                graph, tuple(examples.values()), dynamo=True, opset_version=OPSET, input_names=list(examples),
                output_names=list(outputs), dynamic_shapes=open_sizes, verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as cause:
        root: BaseException = cause
        while root.__cause__ is not None:
            root = root.__cause__
        raise SplitError(
            f"cannot be written as a graph: {one_line(f'{type(root).__name__}: {root}')}; run this client on torch"
        ) from cause
    finally:
        logger.setLevel(level)
    model = _plain(program.model_proto, examples, sizes)
    dequantise_(model.graph)
    foreign = {node.domain for node in model.graph.node} - {""}
    if foreign or model.functions:
        raise SplitError(
            f"needs operators beyond ONNX's own ({', '.join(foreign)}); run this client on torch"
        )
    onnx.checker.check_model(model)
    return model


def _plain(model: onnx.ModelProto, examples: Tensors, sizes: Sizes) -> onnx.ModelProto:
    """The model without what has to do with its making, its open sizes named."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for part in (*graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    names = {}
    for part, example in zip(graph.input, examples.values(), strict=True):
        for dimension, size in zip(part.type.tensor_type.shape.dim, example.shape, strict=True):
            if dimension.dim_param and size in sizes.names:
                names[dimension.dim_param] = sizes.names[size]
    for part in (*graph.input, *graph.output):
        for dimension in part.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = names.get(dimension.dim_param, dimension.dim_param)
    graph.name = "graph"
    return model


def write_graph(path: Path, model: onnx.ModelProto) -> None:
    """Write a model; equal models give equal bytes."""
    path.write_bytes(model.SerializeToString(deterministic=True))


def operators(folder: Path) -> Counter[str]:
    """How often each operator stands in the graphs of a folder."""
    return Counter(node.op_type for file in folder.glob("*.onnx") for node in onnx.load(file).graph.node)
