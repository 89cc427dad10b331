"""A written graph against the function that it was traced from: an engine runs it on other sizes and random values."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from hosl.errors import SplitError
from hosl.split.onnx_export.tracing import Sizes, Tensors

_ALLOWED = 1e-4
"""Of the largest value of all outputs. Rounding leaves some 1e-6; a size that did not stay open fails outright."""


def random_like(examples: Tensors, sizes: Sizes, other: Sizes, given: Mapping[str, torch.Tensor]) -> Tensors:
    """Values for all of `examples`: those `given`, and random ones whose open sizes are `other`."""
    instead = dict(zip(sizes.names, other.names, strict=True))
    generator = torch.Generator().manual_seed(0)

    def value(tensor: torch.Tensor) -> torch.Tensor:
        shape = [instead.get(size, size) for size in tensor.shape]
        if tensor.dtype == torch.int8:
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return torch.randn(shape, generator=generator) * 0.1

    return {name: given[name] if name in given else value(t) for name, t in examples.items()}


def check_graph(path: Path, compute: Callable[[Tensors], Tensors], tensors: Tensors) -> None:
    """Refuse a graph that does not give what `compute` gives.

    Raises:
        SplitError: saying how far it is off.
    """
    expected = compute(tensors)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {place.name: tensors[place.name].numpy() for place in session.get_inputs()}
        found: Any = session.run(list(expected), feed)
    except Exception as cause:  # of the engine, of any class
        raise SplitError(
            f"{path.name} runs on no other number of rows and tokens than it was made with; run this client on torch"
        ) from cause
    scale = max(float(t.double().abs().max()) for t in expected.values())
    for (name, tensor), array in zip(expected.items(), found, strict=True):
        wanted = tensor.detach().numpy().astype(np.float64)
        if wanted.shape != array.shape or np.abs(wanted - array).max() > _ALLOWED * scale:
            raise SplitError(f"{path.name} gives another {name} than torch; run this client on torch")
