"""What the server's allocator keeps for the next call comes back when a text has ended."""

import platform
import subprocess
import sys

import pytest

KEPT = """
import threading
import numpy as np
from hosl.system.allocator import keep_freed_memory, trim

def resident_mib():
    with open("/proc/self/smaps_rollup") as status:  # exact, unlike VmRSS
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("Rss"))

def work():
    before = resident_mib()
    blocks = [np.ones(1 << 20) for _ in range(6)]  # 8 MiB each
    blocks.clear()
    kept = resident_mib() - before
    trim()
    print(kept, resident_mib() - before)
    blocks = [np.ones(1 << 20) for _ in range(6)]
    blocks.clear()
    print(resident_mib() - before)

assert keep_freed_memory()
thread = threading.Thread(target=work)  # has a heap of its own
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_trim_returns_what_a_threads_heap_keeps_and_the_next_blocks_are_kept_again():
    said = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout
    kept, left, again = map(float, said.split())
    assert left < 2
    assert kept > 40
    assert again > 40
