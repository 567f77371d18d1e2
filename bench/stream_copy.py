"""GB/s, read plus written, of a copy between memory and memory on a CPU: what an operation on bytes in no cache may reach.

    python bench/stream_copy.py

A plain store of a CPU reads its cache line before it writes, so that a plain copy moves three bytes where two are counted.
The copies here are glibc's memmove, of as many threads as torch has, told to store past the caches from 1 MB on (on x86;
other CPUs do so by themselves).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

#: Of each of source and target, larger than the last-level caches that we know of.
BYTES = 1 << 29
ROUNDS = 9


def copy_gb_s() -> float:
    """The fastest of ROUNDS copies, made by a process of its own: the C library reads its settings when it starts."""
    tunables = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x100000"}
    run = subprocess.run([sys.executable, __file__], env=os.environ | tunables, stdout=subprocess.PIPE, check=True)
    return float(run.stdout)


def main() -> None:
    source, target = torch.ones(BYTES, dtype=torch.uint8), torch.ones(BYTES, dtype=torch.uint8)
    threads = torch.get_num_threads()
    share = BYTES // threads

    def copy(thread: int) -> None:
        begin = thread * share
        ctypes.memmove(target.data_ptr() + begin, source.data_ptr() + begin, share)

    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            list(pool.map(copy, range(threads)))
            times.append(time.perf_counter() - begin)
    print(2 * share * threads / min(times) / 1e9)


if __name__ == "__main__":
    main()
