"""The client's runtime on PyTorch: the functions that `hosl.network.join` and its session call on a runtime."""

from pathlib import Path
from typing import Any

import torch

from hosl.config import Config
from hosl.inference.halves import TorchDeviceHalf
from hosl.methods.torch_parties import (
    DTYPES,
    check_device,
    head_elements,
    make_client,
    make_head,
    party_bytes,
    trained_elements,
)
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.engine.memory import CudaMemory, TorchMemory, memory_of
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.parties.remote.trunk import RemoteTrunk
from hosl.parties.servers.headed import HeadedServer
from hosl.planner.budget import check_before_data, check_before_run
from hosl.split import ClientHalf, load_half, load_head
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.tensors import tensors_digest
from hosl.system.checkpoint import Checkpoint
from hosl.training.checkpointing import (
    put_client,
    put_head,
    restore_client_,
    restore_head_,
    restore_head_weights_,
)

NAME = "torch"
ARRAYS = False
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
    return f"torch {torch.__version__}"


def remark(folder: Path) -> str | None:
    """A line about a half that this engine may compute otherwise than it was made for; here none."""
    return None


def open_client(config: Config, folder: Path) -> FrozenClient:
    """The client party of a run at its base weights, from the half's folder."""
    half = load_half(folder, DTYPES[config.model.dtype])
    assert isinstance(half, ClientHalf), "half.json was checked to be a client's"
    return make_client(config, half)


def open_head(config: Config, folder: Path, client: FrozenClient, trunk: RemoteTrunk) -> HeadedServer:
    """The head at its base weights, for a client whose labels stay; rounds call it in place of the server."""
    half = load_head(folder, client.half, DTYPES[config.model.dtype])
    return make_head(config, half, client.half, trunk, half_facts(folder, "client").get("new_weights", ()))


def open_text_half(config: Config | None, folder: Path, checkpoint: Checkpoint | None) -> TorchDeviceHalf:
    """The half of this device for texts: as it was split, or with the weights of a run's checkpoint.

    Args:
        config: the settings of the run; None: there is none.
        folder: the folder of the client half.
        checkpoint: of the run; None: the base weights.
    """
    labels_stay = half_facts(folder, "client").get("labels") == "client"
    if config is None:
        half = load_half(folder, torch.float32)
        assert isinstance(half, ClientHalf), "half.json was checked to be a client's"
        return TorchDeviceHalf(half, load_head(folder, half, torch.float32) if labels_stay else None)
    client = open_client(config, folder)
    head = load_head(folder, client.half, DTYPES[config.model.dtype]) if labels_stay else None
    if checkpoint is not None:
        restore_client_(client, checkpoint)
        if head is not None:
            restore_head_weights_(head, checkpoint)
    return TorchDeviceHalf(client.half, head)


def trained_digest(client: Any) -> str:
    """The SHA-256 digest of a client's trained weights, by name: equal for equal halves."""
    return tensors_digest({name: p.detach() for name, p in client.trained.items()})


def memory_meter(client: Any, head: Any = None) -> TorchMemory | CudaMemory:
    """A meter of the memory of this client's calls; `head`: what is on the device of the head, if it is there."""
    return memory_of(client, party_bytes(client, head))
