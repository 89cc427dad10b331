"""Python's collector of cyclic garbage, told to wait while millions of objects come and go without it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, cyclic garbage stays: for seconds of work that makes none, where each pass would walk all of torch."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
