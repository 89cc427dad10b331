"""The newest reply of each client of a run, for a step that is asked again because its reply was lost.

A reply with the gradient at the cut may take megabytes, and a run may have a thousand clients: beyond a limit the
oldest gradients wait in files, which have no names and end with the process, as the replies do.
"""

import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hosl.service.hosted_half import Stepped
from hosl.wire.tensors import WireArray

IN_MEMORY_BYTES = 256 << 20
"""The gradients that the replies of one run keep in memory."""


@dataclass(frozen=True, slots=True)
class _InFile:
    """A gradient in a file."""

    file: Any
    like: WireArray
    """An array without numbers, of its shape and dtype."""

    def read(self) -> WireArray:
        """The gradient."""
        self.file.seek(0)
        numbers = np.frombuffer(self.file.read(), self.like.data.dtype)
        return WireArray(numbers.reshape(self.like.data.shape), self.like.dtype)


@dataclass(frozen=True, slots=True)
class _Kept:
    step: int
    reply: Any
    gradient: _InFile | None = None
    """The reply's, where it is not in `reply`."""


class Replies:
    """The newest (step, reply) of each client. In the compute thread alone."""

    def __init__(self, folder: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        """`folder`: where files go. `in_memory_bytes`: of gradients; those above it are in files."""
        self._folder, self._in_memory_bytes = folder, in_memory_bytes
        self._kept: dict[str, _Kept] = {}
        """In the order in which they came."""
        self._bytes = 0

    def step_of(self, client: str) -> int | None:
        """The step of a client's newest reply; None: it has had none."""
        return self._kept[client].step if client in self._kept else None

    def of(self, client: str) -> Any:
        """A client's newest reply. Requires: it has had one."""
        kept = self._kept[client]
        return kept.reply if kept.gradient is None else replace(kept.reply, gradient=kept.gradient.read())

    def put(self, client: str, step: int, reply: Any) -> None:
        """Keep a reply in place of the one before."""
        self.pop(client)
        self._kept[client] = _Kept(step, reply)
        self._bytes += _bytes_of(reply)
        for oldest in list(self._kept) if self._bytes > self._in_memory_bytes else ():
            if self._bytes <= self._in_memory_bytes:
                break
            with suppress(OSError):  # a full disk: it stays where it is
                self._to_file(oldest)

    def pop(self, client: str) -> None:
        """Forget a client's reply."""
        kept = self._kept.pop(client, None)
        if kept is None:
            return
        self._bytes -= _bytes_of(kept.reply)
        if kept.gradient is not None:
            kept.gradient.file.close()

    def clear(self) -> None:
        """Forget all."""
        for client in list(self._kept):
            self.pop(client)

    def _to_file(self, client: str) -> None:
        kept = self._kept[client]
        taken_bytes = _bytes_of(kept.reply)
        if not taken_bytes:
            return
        gradient: WireArray = kept.reply.gradient
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (open as long as the reply is kept)
        try:
            file.write(gradient.data.tobytes())
            file.flush()
        except OSError:
            file.close()
            raise
        like = WireArray(
            np.broadcast_to(np.zeros((), gradient.data.dtype), gradient.data.shape), gradient.dtype
        )
        self._kept[client] = _Kept(kept.step, replace(kept.reply, gradient=None), _InFile(file, like))
        self._bytes -= taken_bytes


def _bytes_of(reply: Any) -> int:
    gradient = reply.gradient if isinstance(reply, Stepped) else None
    return 0 if gradient is None else gradient.data.nbytes
