"""Products with quantized weights on a CPU against float32's: `python -m benchmarks.quantized`.

What decoding is made of: one row (or `--rows`) times a matrix. Each measurement goes through several matrices, of more
bytes than the cache holds, as a model's layers are gone through. Bar: int8 and nf4 in at most 0.4 of the time of
float32's kernel at 4096 x 4096.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.bars import Bar
from benchmarks.membw import bandwidth
from benchmarks.rounds import Result, interleave, seconds
from easydel import native

SHAPES = ((4096, 4096), (576, 1536), (1536, 576), (576, 49152))  # in, out
BARRED, MOST = SHAPES[0], 0.4  # of float32's time, int8's and nf4's kernels alone
LARGER_THAN_CACHE = 96 << 20  # bytes that one measurement reads
PLAIN = "float32"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--rows", type=int, default=1, help="rows of the inputs (default 1)")
    parser.add_argument("--group", type=int, default=64, help="inputs that share a scale (default 64)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    return parser.parse_args()


def floats(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply as our linear layers do."""
    return native.few_rows(x, [kernel])[0] if native.serves_few_rows(x, [kernel]) else x @ kernel


def contestants(
    inputs: int, outputs: int, options: argparse.Namespace
) -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """Return name → (product, inputs, weights); random codes: their values make no difference to the time."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((options.rows, inputs)), jnp.float32)
    whole = jnp.asarray(rng.integers(-127, 128, x.shape), jnp.int8)
    scales = jnp.asarray(rng.random((outputs, -(-inputs // options.group))), jnp.float32)
    bytes_ = jnp.asarray(rng.integers(-127, 128, (outputs, inputs)), jnp.int8)
    pairs = jnp.asarray(rng.integers(0, 256, (outputs, -(-inputs // 2))), jnp.uint8)
    kernel = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)

    def product(multiply: Callable[..., jax.Array], kind: str) -> Callable[..., jax.Array]:
        return functools.partial(multiply, kind=kind, group_size=options.group)

    return {
        PLAIN: (floats, x, (kernel,)),
        "float32, XLA": (jnp.matmul, x, (kernel,)),
        "int8": (product(native.quantized_rows, "int8"), x, (bytes_, scales)),
        "nf4": (product(native.quantized_rows, "nf4"), x, (pairs, scales)),
        "int4": (product(native.quantized_rows, "int4"), x, (pairs, scales)),
        "a8q": (product(native.integer_rows, "int8"), whole, (bytes_, scales)),
        "a4q": (product(native.integer_rows, "int4"), whole, (pairs, scales)),
    }


def size_of(weights: tuple[jax.Array, ...]) -> int:
    """Return the bytes of a matrix and its scales."""
    return sum(array.nbytes for array in weights)


def task(multiply: Callable[..., Any], x: jax.Array, weights: tuple[jax.Array, ...]) -> Callable[[], float]:
    """Return a measurement: milliseconds of one product, as the mean over copies of the weights."""
    copies = [tuple(jnp.array(array) for array in weights) for _ in range(-(-LARGER_THAN_CACHE // size_of(weights)))]
    compiled = jax.jit(multiply).lower(x, *weights).compile()

    def run() -> None:
        for copy in copies:
            compiled(x, *copy).block_until_ready()

    return lambda: seconds(run) / len(copies) * 1e3


def main() -> None:
    """Measure and report."""
    options = arguments()
    about, rate = report.environment(), max(bandwidth().values())
    results, speeds, bars = [], [], []
    for inputs, outputs in SHAPES:
        found = contestants(inputs, outputs, options)
        result = Result(f"{inputs} → {outputs}", "ms", higher_is_better=False)
        result.values = interleave({name: task(*given) for name, given in found.items()}, options.rounds)
        results.append(result)
        print(report.summary(result), flush=True)
        if (inputs, outputs) == BARRED:
            for name in ("int8", "nf4"):
                most = MOST if native.is_available() else None
                bars.append(Bar(f"{result.title}: {name} ÷ {PLAIN}", result.paired_ratio(name, PLAIN), most=most))
        told = [
            f"{name} {size_of(given[2]) / result.median(name) / 1e6:.1f} ({result.paired_ratio(name, PLAIN):.2f})"
            for name, given in found.items()
        ]
        speeds.append(f"{inputs} → {outputs}: {', '.join(told)}.")
    notes = [
        f"Medians (least-most) of {options.rounds} interleaved rounds; {options.rows} rows, groups of {options.group}; "
        f"{about['cores']} cores of {about['processor']}, load average before {about['load_average'][0]:.1f}, after "
        f"{os.getloadavg()[0]:.1f}; kernels {'on' if native.is_available() else 'off'}.",
        f"GB/s of weights and scales, of {rate / 1e9:.1f} that a stream read from memory before, and in brackets the "
        f"time over {PLAIN}'s, median of the rounds' own ratios:",
        *speeds,
        *map(str, bars),
    ]
    table = report.rows(results, list(results[0].values), [])
    report.show(table, notes)
    if options.markdown:
        options.markdown.write_text(report.markdown(table, notes))


if __name__ == "__main__":
    main()
