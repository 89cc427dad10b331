"""Stored tensors, or rows of them, read without the rest of the file.

The file is opened anew for each: what safetensors maps of it counts as memory of the process until it is closed.
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import safetensors
import torch

from hosl.errors import ModelError
from hosl.split.reading.tensors import add_to_digest


def read_rows(file: Path, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` of a stored tensor, in memory of their own.

    Raises:
        ModelError: if the file cannot be read, or has no such tensor.
    """
    try:
        with safetensors.safe_open(file, "pt") as content:
            return content.get_slice(name)[start:stop].clone()
    except (OSError, safetensors.SafetensorError) as cause:
        raise ModelError(f"{file}: {name} cannot be read: {cause}") from cause


def names_of(file: Path) -> list[str]:
    """The names of the stored tensors, in order; errors as of `each_tensor`."""
    try:
        with safetensors.safe_open(file, "pt") as content:
            return sorted(content.keys())
    except (OSError, safetensors.SafetensorError) as cause:
        raise ModelError(f"{file} cannot be read: {cause}") from cause


def each_tensor(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and content of every stored tensor, in the order of the names; one in memory at a time.

    Raises:
        ModelError: if the file cannot be read.
    """
    try:
        for name in names_of(file):
            with safetensors.safe_open(file, "pt") as content:
                yield name, content.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as cause:
        raise ModelError(f"{file} cannot be read: {cause}") from cause


def stored_digest(file: Path) -> str:
    """`tensors_digest` of the tensors of a file, one in memory at a time.

    Raises:
        ModelError: if the file cannot be read.
    """
    digest = sha256()
    for name, tensor in each_tensor(file):
        add_to_digest(digest, name, tensor)
    return digest.hexdigest()
