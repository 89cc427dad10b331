"""Memory that is freed goes back to the system at once: for processes on small devices."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 1 << 17


def return_freed_memory() -> bool:
    """Have glibc give every large block back when it is freed; returns whether it will.

    By itself glibc raises its threshold to the largest block ever freed, keeps such blocks and fragments: a client step
    of OPT-125M's shape peaked 100 MiB higher (docs/log.md). Other C libraries and systems are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
    except (OSError, AttributeError):
        return False
