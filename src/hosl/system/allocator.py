"""Settings of the memory allocator: devices give freed memory back at once, a server keeps some for the next call."""

import ctypes
import sys
import threading
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""The numbers of these parameters in glibc's malloc.h."""
_THRESHOLD_BYTES = 1 << 17
_LARGEST_KEPT_BYTES = 32 << 20
"""The largest block that is kept when it is freed: the most that glibc would come to by itself."""
_KEPT_BYTES = 64 << 20
"""What each heap keeps free at its end."""
_LOOKED_AT_BYTES = 1 << 16
"""The smallest block whose freeing makes glibc look at the end of its heap."""
_kept = threading.Event()
"""Whether `keep_freed_memory` holds in this process, as glibc's own settings do."""


def trim() -> None:
    """Give the free memory of all heaps back to the system, and what `keep_freed_memory` keeps at this thread's end.

    `malloc_trim` leaves the end of every heap but the first. With other C libraries than glibc, nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        if not _kept.is_set():
            return
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        libc.mallopt(_M_TRIM_THRESHOLD, 0)
        libc.free(libc.malloc(_LOOKED_AT_BYTES))
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> bool:
    """Make glibc return every large block to the system when it is freed; returns whether glibc accepted.

    By default glibc raises its threshold to the size of the largest block ever freed, keeps such blocks, and its heap
    fragments: a client step of OPT-125M's shape then peaked 100 MiB higher (docs/log.md). With other C libraries and
    systems nothing is changed.
    """
    return _set(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)


def keep_freed_memory() -> bool:
    """Make glibc keep some memory for the blocks that come next; returns whether glibc accepted.

    Else each message of half a MiB takes fresh pages, which the system must clear: more than half of what a server's
    event loop does for a tensor.
    """
    if _set(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and _set(_M_TRIM_THRESHOLD, _KEPT_BYTES):
        _kept.set()
    return _kept.is_set()


def _set(parameter: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(parameter, value))
    except (OSError, AttributeError):
        return False
