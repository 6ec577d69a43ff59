"""Streaming-read bandwidth: what bounds decoding, where each token reads every weight once.

`python -m benchmarks.membw [--gigabytes 1]`
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.rounds import seconds


def readers(gigabytes: float, threads: int) -> dict[str, Callable[[], object]]:
    """Return functions that read an array larger than any cache once, on all threads."""
    array = np.ones(int(gigabytes * 1e9) // 4, np.float32)
    parts = np.array_split(array, threads * 8)
    pool = ThreadPoolExecutor(threads)
    found: dict[str, Callable[[], object]] = {"numpy max": lambda: list(pool.map(np.max, parts))}
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(threads)
    tensor = torch.from_numpy(array)
    return found | {"torch sum": lambda: tensor.sum()}


def bandwidth(gigabytes: float = 1.0, repeats: int = 5) -> dict[str, float]:
    """Return the median of each reader in bytes per second."""
    threads = len(os.sched_getaffinity(0))
    result = {}
    for name, read in readers(gigabytes, threads).items():
        read()
        size = int(gigabytes * 1e9) // 4 * 4
        result[name] = size / statistics.median(seconds(read) for _ in range(repeats))
    return result


def main() -> None:
    """Print the bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    for name, value in bandwidth(parser.parse_args().gigabytes).items():
        print(f"{name:10} {value / 1e9:6.1f} GB/s")


if __name__ == "__main__":
    main()
