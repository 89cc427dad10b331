"""The ranks as one group: commands from rank 0 to all, sums and gathers among all, and one outcome for all.

Commands have a gloo group of their own whose limit is years: a service may be idle for days. NCCL, where there are
GPUs, and gloo otherwise carry the numbers; nobody waits in them between two commands.
"""

import json
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hosl.core.layout import Layout
from hosl.ranks.place import BROKEN, Place

_IDLE = timedelta(days=3650)
_NUMBERS = timedelta(minutes=30)
"""The longest that one rank waits for another's numbers: longer than a checkpoint takes to write."""
_BLOCK_BYTES = 4096
"""The first message of a command; a longer one goes on in a second message."""
_OUTCOME_BYTES = 512
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int16, torch.int32,
        torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip


class Group:
    """All ranks. Every method but the properties is called by all of them, in the same order."""

    def __init__(
        self, place: Place, layout: Layout, device: torch.device, *, numbers_wait: timedelta = _NUMBERS
    ) -> None:
        """Join the others; returns when all are there."""
        self.place, self.layout, self.device = place, layout, device
        if place.store is not None:  # one machine: nobody else can connect
            interface = _loopback()
            os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        store = None if place.store is None else FileStore(str(place.store), place.ranks)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=place.rank, world_size=place.ranks,
            timeout=numbers_wait,
        )  # fmt: skip
        self._commands: Any = dist.new_group(backend="gloo", timeout=_IDLE)
        self.mesh: DeviceMesh | None = None
        """Over the ranks of a copy, or over copies and the ranks of each; None: each rank holds all weights."""
        if layout.per_copy > 1:
            shape = (layout.per_copy,) if layout.copies == 1 else (layout.copies, layout.per_copy)
            names = ("shards",) if layout.copies == 1 else ("copies", "shards")
            self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self.place.rank

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.place.rank == 0

    # ---- commands ----

    def tell(self, command: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Send a command to all others. Rank 0 only; they are in `hear`."""
        specs = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({"command": command, "tensors": specs}).encode()
        message = len(text).to_bytes(8, "little") + text
        message += b" " * max(0, _BLOCK_BYTES - len(message))
        for part in (message[:_BLOCK_BYTES], message[_BLOCK_BYTES:]):
            if part:
                self._from_first(torch.frombuffer(bytearray(part), dtype=torch.uint8))
        for tensor in tensors:
            if tensor.numel():
                self._from_first(tensor.reshape(-1).view(torch.uint8))

    def hear(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The next command of rank 0, and its tensors."""
        block = self._from_first(torch.empty(_BLOCK_BYTES, dtype=torch.uint8)).numpy().tobytes()
        size, text = int.from_bytes(block[:8], "little"), block[8:]
        if size > len(text):
            text += self._from_first(torch.empty(size - len(text), dtype=torch.uint8)).numpy().tobytes()
        message = json.loads(text[:size])
        tensors = [torch.empty(shape, dtype=_DTYPES[name]) for name, shape in message["tensors"]]
        for tensor in tensors:
            if tensor.numel():
                self._from_first(tensor.view(-1).view(torch.uint8))
        return message["command"], tensors

    def outcomes(self, outcome: str) -> list[str]:
        """The outcomes of a command on all ranks, cut to some hundred letters; empty: it succeeded."""
        mine = torch.zeros(_OUTCOME_BYTES, dtype=torch.uint8)
        text = outcome.encode()[:_OUTCOME_BYTES]
        if text:
            mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.layout.ranks)]
        dist.all_gather(everyone, mine, group=self._commands)
        return [one.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for one in everyone]

    def _from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=0, group=self._commands)
        return tensor

    # ---- numbers ----

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, one shape each, one after the other in the first dimension."""
        everyone = [torch.empty_like(own) for _ in range(self.layout.ranks)]
        dist.all_gather(everyone, own.contiguous())
        return torch.cat(everyone)

    def of_first(self, own: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, in place of one of the same shape."""
        first = own.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, src=0)
        return first

    def sum_gradients_(self, trained: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all ranks, each of which holds all weights, in float32 or better.

        A weight that no rank has a gradient of keeps none, as in one process; where only some have one, others' is 0.
        """
        weights = list(trained)
        has = torch.tensor([p.grad is not None for p in weights], dtype=torch.int8)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        for p, somewhere in zip(weights, has.tolist(), strict=True):
            if somewhere:
                own = torch.zeros_like(p) if p.grad is None else p.grad
                total = own.to(torch.promote_types(own.dtype, torch.float32)).contiguous()
                dist.all_reduce(total)
                p.grad = total.to(own.dtype)


def end_broken(place: Place, reason: BaseException | str) -> NoReturn:
    """End this process at once, without answering anybody: a connection that is lost makes a client try again.

    An answer, if only that something failed, would make it stop.
    """
    what = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
    sys.stderr.write(f"rank {place.rank} ends: {' '.join(what.split())[:500]}\n")
    sys.stderr.flush()
    os._exit(BROKEN)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")
