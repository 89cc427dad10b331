"""The client's runtime on ONNX Runtime: the functions that `hosl.network.join` and its session call on a runtime.

No torch, here and below.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hosl.config import Config
from hosl.errors import ConfigError
from hosl.inference.decoding import Candidates, most_probable
from hosl.methods.schedule import learning_rate
from hosl.methods.trained_head import trained_at_client
from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.engine import engine_version
from hosl.parties.edge.half import EdgeHalf, check_engine
from hosl.parties.edge.head import EdgeHalfHead, EdgeHeadedServer
from hosl.parties.edge.make import check_config, make_edge_client
from hosl.parties.edge.memory import ProcessMemory
from hosl.parties.headed import Trunk
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.runtime_json import read_runtime_json
from hosl.system.checkpoint import Checkpoint
from hosl.tasks import Task
from hosl.training.edge_checkpointing import (
    put_client,
    put_head,
    restore_client_,
    restore_head_,
    restore_head_weights_,
    trained_digest,
)
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
    checked = read_runtime_json(folder, files=False).versions.get("onnxruntime")
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
    if config.client.memory_budget is not None:  # imports only now: a run without a budget needs no planner
        from hosl.planner.edge_budget import check_edge_budget

        check_edge_budget(config, Path(model), task)


def open_client(config: Config, folder: Path) -> FrozenEdgeClient:
    """The client party of a run at its base weights, from the half's folder; its graphs can be used."""
    client = make_edge_client(config, folder)
    client.half.open_graphs()
    return client


def trained_elements(client: FrozenEdgeClient) -> int:
    """The number of weight elements that a client trains."""
    return sum(weight.size for weight in client.trained.values())


def memory_meter(client: FrozenEdgeClient, head: Any = None) -> ProcessMemory:
    """A meter of the memory of this client's calls: that of the process, beyond what it had before the half."""
    return ProcessMemory(client.half.before_bytes)


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
    """
    client = None if config is None else open_client(config, folder)
    half = EdgeHalf(folder) if client is None else client.half
    head = EdgeHalfHead(half) if half_facts(folder, "client").get("labels") == "client" else None
    if client is not None and checkpoint is not None:
        restore_client_(client, checkpoint)
        if head is not None:
            restore_head_weights_(head, checkpoint)
    return EdgeTextHalf(half, head)


class EdgeTextHalf:
    """The half of a device that generates with a server's. It keeps no cache: every token computes the text again."""

    def __init__(self, half: EdgeHalf, head: EdgeHalfHead | None = None) -> None:
        self._half, self._head = half, head

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
        """See `hosl.inference.remote.DeviceHalf`."""
        assert self._head is not None, "a half without a head is answered with candidates"
        return most_probable(self._head.logits(from_wire(state))[-1], count)


def open_head(config: Config, folder: Path, client: FrozenEdgeClient, trunk: Trunk) -> EdgeHeadedServer:
    """The head at its base weights, for a client whose labels stay; rounds call it in place of the server."""
    head, new = EdgeHalfHead(client.half), half_facts(folder, "client").get("new_weights", ())
    return EdgeHeadedServer(
        trunk, head, [name for name in head.facts.weights if trained_at_client(config, name, new)],
        learning_rate=learning_rate(config, config.server_rate), optimiser=config.server.optimiser,
    )  # fmt: skip


def head_elements(head: EdgeHeadedServer) -> int:
    """The number of weight elements that the head on this device trains."""
    return sum(weight.size for weight in head.trained.values())
