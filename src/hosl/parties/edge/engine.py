"""The inference engine behind one seam: a graph's file -> a function of arrays. Here ONNX Runtime.

Another engine needs this file's two names. Settings that change bits are fixed: one thread by default, and one level
of graph optimisation. Memory goes back when it is freed: no arena, no memory pattern.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hosl.errors import ConfigError, FailureError, ModelError

_OPTIMISATION = "ORT_ENABLE_ALL"
"""The level of graph optimisation. Bits depend on it, so it is part of what a resumed run relies on."""


class Graph:
    """An opened graph: named arrays in, named arrays out."""

    def __init__(self, session: Any, path: Path, engine: Any) -> None:
        self._session, self._path = session, path
        self._run_options = engine.RunOptions()
        self._run_options.only_execute_path_to_fetches = True
        self.inputs: dict[str, tuple[int | None, ...]] = {
            node.name: tuple(size if isinstance(size, int) else None for size in node.shape)
            for node in session.get_inputs()
        }
        """The shape of each input, by name; None: a size that each call chooses."""
        self.outputs: tuple[str, ...] = tuple(node.name for node in session.get_outputs())
        """The names of the outputs, in the order of the file."""

    def __call__(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs by name; None: all. Inputs are read where they lie, C-contiguous ones without a copy.

        What only leads to other outputs is not computed. Requires: inputs that nothing writes meanwhile.

        Raises:
            FailureError: if the engine refuses the inputs or fails.
        """
        names = list(self.outputs if outputs is None else outputs)
        feeds = {name: array for name, array in inputs.items() if name in self.inputs}
        try:
            found = self._session.run(names, feeds, self._run_options)
        except Exception as cause:  # the engine has a dozen kinds without a root of their own
            raise FailureError(f"the graph {self._path} failed: {_one_line(cause)}") from cause
        return dict(zip(names, found, strict=True))


def open_graph(path: Path, *, threads: int = 1) -> Graph:
    """The graph of a file, ready to be called.

    Requires: a file whose digest was checked, since it is read by a parser that trusts it.

    Raises:
        ConfigError: if the engine is not installed.
        ModelError: if the file is missing, cut short, or holds an operator that this engine does not know.
    """
    engine = _engine()
    options = engine.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.graph_optimization_level = getattr(engine.GraphOptimizationLevel, _OPTIMISATION)
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        session = engine.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as cause:
        raise ModelError(
            f"the graph {path} cannot be opened by onnxruntime {engine.__version__}: {_one_line(cause)}; split the "
            "model again, or install the version of onnxruntime that runtime.json names"
        ) from cause
    return Graph(session, path, engine)


def engine_version() -> str:
    """The version of the engine.

    Raises:
        ConfigError: if it is not installed.
    """
    return str(_engine().__version__)


def _engine() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise ConfigError(
            "the onnx runtime needs onnxruntime, which is not installed; `pip install 'hosl[edge]'`"
        ) from None


def _one_line(cause: Exception) -> str:
    return " ".join(str(cause).split())[:300]
