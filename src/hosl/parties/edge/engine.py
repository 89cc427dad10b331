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
        self._session, self._path, self._engine = session, path, engine
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
        self,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] | None = None,
        *,
        into: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The outputs by name. Inputs are read where they lie, C-contiguous ones without a copy.

        What only leads to other outputs is not computed. Requires: inputs that nothing writes meanwhile, but for sums
        that are inputs and outputs of one node.

        Args:
            inputs: by name; those that the graph does not take are passed over.
            outputs: their names; None: all.
            into: by output, the C-contiguous array that it is written to, in place of a new one.

        Raises:
            FailureError: if the engine refuses the inputs or fails.
        """
        into = into or {}
        names = [name for name in (self.outputs if outputs is None else outputs) if name not in into]
        feeds = {name: array for name, array in inputs.items() if name in self.inputs}
        try:
            found = (
                self._bound(feeds, names, into)
                if into
                else self._session.run(names, feeds, self._run_options)
            )
        except Exception as cause:  # the engine has a dozen kinds without a root of their own
            raise FailureError(f"the graph {self._path} failed: {_one_line(cause)}") from cause
        return dict(zip(names, found, strict=True)) | dict(into)

    def _bound(
        self, feeds: Mapping[str, np.ndarray], names: Sequence[str], into: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        binding, value_of = self._session.io_binding(), self._engine.OrtValue.ortvalue_from_numpy
        values = [value_of(np.ascontiguousarray(array)) for array in feeds.values()]
        for name, value in zip(feeds, values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        for name, array in into.items():
            assert array.flags.c_contiguous, f"{name} would be written beside its array"
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding, self._run_options)
        return [value.numpy() for value in binding.get_outputs()[: len(names)]]


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
