"""The client's runtime on ONNX Runtime: the functions that `hosl.network.join` and its session call on a runtime.

No torch, here and below. The head of labels that stay with the client is not here: such runs are refused by name.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.inference.decoding import Candidates
from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.engine import engine_version
from hosl.parties.edge.half import EdgeHalf, check_engine
from hosl.parties.edge.make import check_config, make_edge_client
from hosl.parties.edge.memory import ProcessMemory
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.runtime_json import read_runtime_json
from hosl.system.checkpoint import Checkpoint
from hosl.tasks import Task
from hosl.training.edge_checkpointing import put_client, restore_client_, trained_digest
from hosl.wire.tensors import WireArray

NAME = "onnx"
ARRAYS = True
"""Whether the tensors of its checkpoints are read as numpy's arrays."""

__all__ = [
    "ARRAYS", "NAME",
    "check_before_data", "check_before_run", "check_device", "engine", "from_wire", "head_elements",
    "memory_meter", "open_client", "open_head", "open_text_half",
    "put_client", "put_head", "remark", "restore_client_", "restore_head_", "to_wire", "trained_digest",
    "trained_elements",
]  # fmt: skip


def engine() -> str:
    """The engine and its version, for a run's record."""
    return f"onnxruntime {engine_version()}"


def remark(folder: Path) -> str | None:
    """A line about graphs that were checked with another version of the engine; None: with this one."""
    checked = read_runtime_json(folder).versions.get("onnxruntime")
    if checked == engine_version():
        return None
    return (
        f"the graphs in {folder} were checked with onnxruntime {checked}, {engine_version()} is installed: what they "
        "compute may differ in its last digits"
    )


def check_device(name: str, setting: str) -> None:
    """Refuse a device other than the processor.

    Raises:
        ConfigError: naming the setting.
    """
    if name != "cpu":
        raise ConfigError(
            f"{setting}: {name} is for the torch runtime; the onnx runtime computes on the cpu: leave it out"
        )


def check_before_data(config: Config, model: str, *, head: Any = None, alone: bool) -> None:
    """Refuse what the engine has not, and a half whose graphs it cannot use, before any data is read.

    Args:
        config: the settings of the run.
        model: the folder of the client half.
        head: is not looked at.
        alone: whether the client has a process of its own; it always has.

    Raises:
        ConfigError: naming the setting. ModelError: naming the graph, or the engine that it needs.
    """
    check_config(config)
    _check_labels(Path(model))
    check_engine(read_runtime_json(Path(model)).minimum_onnxruntime)


def check_before_run(config: Config, model: str, task: Task, *, alone: bool) -> None:
    """Refuse a budget that the longest batches would exceed.

    Args:
        config: the settings of the run.
        model: the folder of the client half.
        task: the data.
        alone: whether the client has a process of its own; it always has.

    Raises:
        BudgetError: naming the nearest setting that fits.
    """


def open_client(config: Config, folder: Path) -> FrozenEdgeClient:
    """The client party of a run at its base weights, from the half's folder."""
    return make_edge_client(config, folder)


def trained_elements(client: FrozenEdgeClient) -> int:
    """The number of weight elements that a client trains."""
    return sum(weight.size for weight in client.trained.values())


def memory_meter(client: FrozenEdgeClient, head: Any = None) -> ProcessMemory:
    """A meter of the memory of this client's calls: that of the whole process."""
    return ProcessMemory()


def to_wire(array: np.ndarray) -> WireArray:
    """An array [rows, seq, width] of float32 for the wire; shares memory where it can."""
    return WireArray(np.ascontiguousarray(array, np.float32), "float32")


def from_wire(array: WireArray) -> np.ndarray:
    """An array from the wire; shares memory, but of bfloat16, which is widened to float32."""
    return array.widened()


def open_text_half(config: Config | None, folder: Path, checkpoint: Checkpoint | None) -> "EdgeTextHalf":
    """The half of this device for texts: as it was split, or with the weights of a run's checkpoint.

    Args:
        config: the settings of the run; None: there is none.
        folder: the folder of the client half.
        checkpoint: of the run; None: the base weights.

    Raises:
        ConfigError: if its labels stay with the client.
    """
    _check_labels(folder)
    if config is None:
        return EdgeTextHalf(EdgeHalf(folder))
    client = open_client(config, folder)
    if checkpoint is not None:
        restore_client_(client, checkpoint)
    return EdgeTextHalf(client.half)


class EdgeTextHalf:
    """The half of a device that generates with a server's. It keeps no cache: every token computes the text again."""

    def __init__(self, half: EdgeHalf) -> None:
        self._half = half

    def new_text(self) -> Callable[[Sequence[int]], WireArray]:
        """See `hosl.inference.remote.DeviceHalf`."""
        text: list[int] = []

        def go_on(ids: Sequence[int]) -> WireArray:
            text.extend(ids)
            rows = np.array([text], np.int64)
            hidden = self._half.forward(rows, np.ones_like(rows))
            return to_wire(hidden[:, len(text) - len(ids) :])

        return go_on

    def candidates(self, state: WireArray, count: int) -> Candidates:
        """Not here: a half whose labels stay with the client is refused before."""
        _refuse_head()


def open_head(config: Config, folder: Path, client: Any, trunk: Any) -> NoReturn:
    """Not here; `check_before_data` refuses such runs first."""
    _refuse_head()


def put_head(checkpoint: Checkpoint, server: Any) -> NoReturn:
    """Not here; see `open_head`."""
    _refuse_head()


def restore_head_(server: Any, checkpoint: Checkpoint) -> NoReturn:
    """Not here; see `open_head`."""
    _refuse_head()


def head_elements(head: Any) -> NoReturn:
    """Not here; see `open_head`."""
    _refuse_head()


def _check_labels(folder: Path) -> None:
    if half_facts(folder, "client").get("labels") == "client":
        _refuse_head()


def _refuse_head() -> NoReturn:
    raise ConfigError(
        "wire.labels: client keeps the model's head on the device, which the onnx runtime has not: split with "
        "--labels-at server and set wire.labels: server, or take the torch runtime"
    )
