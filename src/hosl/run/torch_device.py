"""The client's runtime on PyTorch: what `hosl.run.join` asks of a runtime, under the names that it asks for."""

from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.parties.torch_client import FrozenClient
from hosl.parties.torch_memory import TorchMemory
from hosl.parties.torch_wire import from_wire, to_wire
from hosl.run.torch_halves import (
    DTYPES,
    make_client,
    party_bytes,
    put_client,
    restore_client_,
    trained_elements,
)
from hosl.split import ClientHalf, load_half
from hosl.split.streaming import tensors_digest

__all__ = [
    "from_wire", "memory_meter", "open_client", "put_client", "restore_client_", "to_wire", "trained_digest",
    "trained_elements",
]  # fmt: skip


def open_client(config: Config, folder: Path) -> FrozenClient:
    """The client party of a run at its base weights, from the half's folder."""
    half = load_half(folder)
    assert isinstance(half, ClientHalf), "half.json was checked to be a client's"
    half.to(DTYPES[config.model.dtype])
    return make_client(config, half)


def trained_digest(client: Any) -> str:
    """SHA-256 over the trained weights of a client, by name: equal for equal halves."""
    return tensors_digest({name: p.detach() for name, p in getattr(client, "trained", {}).items()})


def memory_meter(client: Any) -> TorchMemory:
    """Measures the memory of this client's verbs."""
    return TorchMemory(party_bytes(client))
