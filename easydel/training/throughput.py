"""How fast a run goes, against what the hardware could do, and what it takes in memory."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Dense matrix products in bfloat16 (float16 where there is none), operations per second and device as JAX counts them,
# from the vendors' data sheets. Until v3, and again from v7 on, each half of a TPU chip is a device; JAX calls a v5p
# "TPU v5". The first name found in a device's kind, as whole words, counts.
PEAK_FLOPS = {
    "h100 pcie": 756e12, "h100 nvl": 835e12, "h200 nvl": 835e12, "h100": 989e12, "h200": 989e12, "gh200": 989e12,
    "gb200": 2500e12, "b200": 2250e12, "a100": 312e12, "a10g": 70e12, "a10": 125e12, "a40": 150e12, "l40s": 362e12,
    "l40": 181e12, "l4": 121e12, "v100": 125e12, "t4": 65e12,
    "tpu v2": 23e12, "tpu v3": 61.5e12, "tpu v4 lite": 138e12, "tpu v4": 275e12, "tpu v5 lite": 197e12,
    "tpu v5e": 197e12, "tpu v5p": 459e12, "tpu v5": 459e12, "tpu v6 lite": 918e12, "tpu v6e": 918e12,
    "tpu7": 1153e12, "tpu7x": 1153e12,
}  # fmt: skip


def peak_flops(device: Any | None = None) -> float:
    """Return the floating-point operations a device can do in a second: from a table, else measured.

    The measurement is the best of a few products of `[1024, 1024]` float32 matrices, on all cores of a CPU.
    """
    device = device or jax.local_devices()[0]
    kind = device.device_kind.lower()
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", kind):
            return flops
    size = 1024
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    jax.block_until_ready(multiply(matrix, matrix))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def memory_in_use() -> int:
    """Return bytes: the most a device has held so far if it says so, else this process's memory."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
    if peaks:
        return max(peaks)
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


class Meter:
    """Counts tokens between two readings of the clock.

    Args:
        flops_per_token: of a forward and a backward pass; 0 if not known.
    """

    def __init__(self, flops_per_token: float) -> None:
        self.flops_per_token = flops_per_token
        self._peak: float | None = None
        self._tokens, self._began = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self._tokens += tokens

    def restart(self) -> None:
        """Leave out what has happened since the last reading, such as compiling or saving."""
        self._tokens, self._began = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return `tokens_per_second`, `mfu` (share of what all devices could do) and `memory_bytes`; start anew."""
        rate = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        mfu = rate * self.flops_per_token / self.peak
        self.restart()  # the first time the peak may have been measured meanwhile
        return {"tokens_per_second": rate, "mfu": mfu, "memory_bytes": memory_in_use()}

    @property
    def peak(self) -> float:
        """Operations a second of all devices; the simulated devices of one CPU share its cores."""
        if self._peak is None:
            count = 1 if jax.local_devices()[0].platform == "cpu" else jax.device_count()
            self._peak = peak_flops() * count
        return self._peak
