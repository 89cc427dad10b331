"""A half's weights over the ranks of a copy, by PyTorch's FSDP2: each rank holds the same rows of every tensor.

Each block is gathered when it is used and let go again; the head with its norm is gathered for a whole forward pass.
Under adapters the frozen weights are whole on every rank and never gathered.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hosl.config import Config
from hosl.errors import ModelError
from hosl.methods.schedule import learning_rate
from hosl.methods.torch_parties import DTYPES, prepare_server_half_
from hosl.ranks.group import Group
from hosl.ranks.servers import RankedServer, RankedSynchronousServer
from hosl.split import ServerHalf, load_half
from hosl.split.artifact import SERVER_FILE, blank_half
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.row_ranges import read_rows, stored_digest
from hosl.split.reading.skeleton import restore_buffers_


class _Root(nn.Module):
    """A half as one module: FSDP's root, whose forward is the half's call, whichever modules that calls."""

    def __init__(self, half: ServerHalf) -> None:
        super().__init__()
        self.model = half.model
        self._call = half

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self._call(*inputs)


class ShardedHalf(ServerHalf):
    """A `ServerHalf` that is called through FSDP's root."""

    def __init__(self, half: ServerHalf, root: nn.Module) -> None:
        self.__dict__.update(half.__dict__)
        self.root = root
        """The module that `fully_shard` was called with last."""

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """As of `ServerHalf`."""
        with warnings.catch_warnings():
            # OPT's blocks end with a view, which nothing writes to
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            return self.root(*inputs)


def ranked_server(
    config: Config, folder: Path, new_weights: list[str], group: Group, *, synchronous: bool
) -> RankedServer:
    """This rank's server party of a run at its base weights, read from the server's folder of a split model.

    Raises:
        ModelError: if the folder's tensors are not those that were written.
    """
    eta = learning_rate(config, config.server_rate)
    kind = RankedSynchronousServer if synchronous else RankedServer
    half = _half(config, folder, new_weights, group)
    return kind(
        half, group=group, learning_rate=eta, optimiser=config.server.optimiser, device=str(group.device)
    )


def _half(config: Config, folder: Path, new_weights: list[str], group: Group) -> ServerHalf:
    dtype = DTYPES[config.model.dtype]
    adapters = config.server.trainable == "lora"
    if group.mesh is None or adapters:
        half: Any = load_half(folder, dtype)
        prepare_server_half_(config, half, new_weights)
        half.to(group.device)
        frozen = {p for p in half.parameters() if not p.requires_grad}
        return half if group.mesh is None else _sharded(half, group, frozen)
    half = blank_half(folder, "server", dtype)
    prepare_server_half_(config, half, new_weights)
    restore_buffers_(half.model)
    sharded = _sharded(half, group, set())
    _read_(sharded, folder, dtype, group)
    return sharded


def _sharded(half: ServerHalf, group: Group, ignored: set[nn.Parameter]) -> ShardedHalf:
    """The half with its weights made this rank's rows of them; `ignored` stay whole."""
    dtype = next(half.parameters()).dtype
    # sums in float32: of bfloat16 numbers, too
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32 if dtype.itemsize < 4 else None)
    options: dict[str, Any] = {
        "mesh": group.mesh, "mp_policy": precision, "ignored_params": ignored,
        "reshard_after_forward": not group.layout.keep_gathered,
    }  # fmt: skip
    blocks = half.model.get_submodule(half.blocks_name)
    for index in half.own_blocks:
        fully_shard(blocks[index], **options)
    root = _Root(half)
    fully_shard(root, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # FSDP's mean over ranks would divide dL/dh or the loss; gradients are of parts of one mean already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return ShardedHalf(half, root)


def _read_(half: ShardedHalf, folder: Path, dtype: torch.dtype, group: Group) -> None:
    """Give a half without memory this rank's rows of every tensor, in place."""
    file = folder / Path(SERVER_FILE).name
    # once on a machine, while the others read
    if group.place.local_rank == 0 and stored_digest(file) != half_facts(folder, "server")["digest"]:
        raise ModelError(f"{folder}: the tensors do not have the digest of half.json; split the model again")
    rows = {}
    for name, p in half.model.named_parameters():
        assert isinstance(p, DTensor), f"{name} is on every rank"
        start, stop = own_rows(p)
        rows[name] = like(p, read_rows(file, name, start, stop).to(group.device, dtype))
    buffers = {name: tensor for name, tensor in half.state_dict().items() if name not in rows}
    for name, tensor in buffers.items():  # such as a scale of a layer, which some families store
        buffers[name] = read_rows(file, name, 0, len(tensor)).to(tensor.dtype)
    half.load_state_dict(rows | buffers, assign=True)


def own_rows(p: DTensor) -> tuple[int, int]:
    """The rows of a tensor that this rank holds, from and to: as `torch.chunk` shares them out."""
    mesh = p.device_mesh
    shards, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    each = -(-p.shape[0] // shards)
    start = min(index * each, p.shape[0])
    return start, min(start + each, p.shape[0])


def like(p: DTensor, rows: torch.Tensor) -> DTensor:
    """A tensor shared out as `p` is, from this rank's rows of it."""
    return DTensor.from_local(
        rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every rank of its copy; all ranks call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_go_(half: ServerHalf) -> None:
    """Let go of all gathered weights, before this rank's rows are written."""
    root = getattr(half, "root", None)
    for module in () if root is None else root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_(p: torch.nn.Parameter, tensor: torch.Tensor) -> None:
    """Set a trained weight from all of its rows, in place."""
    with torch.no_grad():
        if isinstance(p, DTensor):
            start, stop = own_rows(p)
            p.to_local().copy_(tensor[start:stop])
        else:
            p.copy_(tensor)


def set_state_(server: RankedServer, name: str, entry: str, tensor: torch.Tensor) -> None:
    """Set an entry of the optimiser's state of a weight, from all of its rows."""
    p = server.trained[name]
    if entry == "step":  # torch keeps the count of steps on the CPU
        value: torch.Tensor = tensor
    elif isinstance(p, DTensor):
        start, stop = own_rows(p)
        value = like(p, tensor[start:stop].to(p.device, copy=True))
    else:
        value = tensor.to(p.device)
    server.optimiser.state[p][entry] = value


def optimiser_state(server: RankedServer) -> Mapping[str, torch.Tensor]:
    """The optimiser's state by `weight/entry`, each tensor as this rank holds it."""
    return {
        f"{name}/{entry}": torch.as_tensor(value)
        for name, p in server.trained.items()
        for entry, value in server.optimiser.state.get(p, {}).items()
        if value is not None
    }
