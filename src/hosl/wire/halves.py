"""The list of a half that is given away: its tensors by name, dtype, shape and digest; and its messages."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import prod

from hosl.errors import LimitError, WireError
from hosl.wire import hosl_pb2 as pb

JOURNAL = "journal"
"""The name of the journal among the tensors: bytes in one dimension."""
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""The bytes of an element, by the dtype's name in safetensors."""
MOST_TENSORS = 1 << 18
_NAME = re.compile(r"journal|(?:base|trained|head)/[A-Za-z0-9_.]{1,400}")
_MOST_BYTES = 1 << 44
_LIST_BYTES = 1 << 18
"""The size from which on a list is sent in several messages."""


@dataclass(frozen=True, slots=True)
class GivenTensor:
    """A tensor of a half that is given away."""

    name: str
    """base/NAME, trained/NAME or head/NAME, NAME as in the model; or `journal`."""
    dtype: str
    """The dtype's name in safetensors, such as F32."""
    shape: tuple[int, ...]
    sha256: bytes
    """The digest of its bytes."""

    @property
    def size_bytes(self) -> int:
        """The size of its elements."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class HalfListing:
    """What is given away of a half: tensors in the order in which their bytes are sent."""

    step: int
    """The step of the state."""
    tensors: tuple[GivenTensor, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 over step, names, dtypes, shapes and digests, in hexadecimal."""
        digest = sha256(f"{self.step}\n".encode())
        for tensor in self.tensors:
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.sha256.hex()}\n".encode())
        return digest.hexdigest()

    def named(self, place: str) -> dict[str, GivenTensor]:
        """The tensors of a place, `base`, `trained` or `head`, by their names in the model."""
        prefix = f"{place}/"
        return {t.name.removeprefix(prefix): t for t in self.tensors if t.name.startswith(prefix)}

    def messages(self) -> Iterator[pb.HalfList]:
        """The list as messages, each small enough to be sent."""
        part = pb.HalfList(step=self.step)
        for tensor in self.tensors:
            message = pb.HalfTensor(
                name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, sha256=tensor.sha256
            )
            if part.ByteSize() + message.ByteSize() > _LIST_BYTES:
                part.more = True
                yield part
                part = pb.HalfList(step=self.step)
            part.tensors.append(message)
        yield part


def listing_of(parts: Iterable[pb.HalfList], *, most_bytes: int = _MOST_BYTES) -> HalfListing:
    """The list of these messages, read up to its end; sizes are checked before anything is made by them.

    Raises:
        WireError: if a name, dtype, shape or digest cannot be one, a name comes twice, or the list does not end.
        LimitError: if the tensors take more than `most_bytes`.
    """
    tensors, names, total, step = list[GivenTensor](), set[str](), 0, 0
    for part in parts:
        step = part.step
        for message in part.tensors:
            tensor = _tensor(message)
            names.add(tensor.name)
            tensors.append(tensor)
            total += tensor.size_bytes
            if len(names) != len(tensors) or len(tensors) > MOST_TENSORS:
                raise WireError(
                    f"the list of a half names {tensor.name} twice, or more than {MOST_TENSORS} tensors"
                )
            if total > most_bytes:
                raise LimitError(f"the half takes more than {most_bytes:,} bytes, which it may not")
        if not part.more:
            return HalfListing(step, tuple(tensors))
        if not part.tensors:
            break
    raise WireError("the list of a half has no end")


def _tensor(message: pb.HalfTensor) -> GivenTensor:
    shape = tuple(message.shape)
    if not _NAME.fullmatch(message.name) or message.dtype not in ITEM_BYTES or len(message.sha256) != 32:
        raise WireError(
            f"the list of a half has {message.name[:80]!r} of dtype {message.dtype[:8]!r}, no tensor's name, dtype "
            "and digest"
        )
    if len(shape) > 8 or any(not 1 <= size <= _MOST_BYTES for size in shape):
        raise WireError(f"{message.name} of a half has the shape {list(shape)[:8]}; every size is 1 or more")
    if message.name == JOURNAL and (message.dtype != "U8" or len(shape) != 1):
        raise WireError("the journal of a half is bytes in one dimension")
    return GivenTensor(message.name, message.dtype, shape, message.sha256)
