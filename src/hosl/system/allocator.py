"""A setting of the memory allocator for small devices: freed memory goes back to the operating system at once."""

import ctypes
import sys
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
"""The number of this parameter in glibc's malloc.h."""
_THRESHOLD_BYTES = 1 << 17


def trim() -> None:
    """Give what is free in the allocator's heap back to the system; with other C libraries than glibc, do nothing."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_freed_memory() -> bool:
    """Make glibc return every large block to the system when it is freed; returns whether glibc accepted.

    By default glibc raises its threshold to the size of the largest block ever freed, keeps such blocks, and its heap
    fragments: a client step of OPT-125M's shape then peaked 100 MiB higher (docs/log.md). With other C libraries and
    systems nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
    except (OSError, AttributeError):
        return False
