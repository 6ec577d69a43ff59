"""How much faster many prompts are side by side than one by one: `python -m benchmarks.many`.

A random Llama; `generate_many` with 16 rows against 1 row on the same prompts, in interleaved rounds, and the bytes of
live arrays while 200 prompts of random lengths and limits pass. See benchmarks/README.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.checkpoint import SMOLLM2_135M, TINY, Shape


def model_of(shape: Shape) -> Any:
    """Return a random model; no token ends a text."""
    import easydel

    fields = {name: value for name, value in vars(shape).items() if name not in ("name", "rope_theta", "dtype")}
    config = easydel.LlamaConfig(
        **fields,
        tie_word_embeddings=True,
        initializer_range=0.04,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
    )
    return easydel.LlamaForCausalLM(config, rngs=nnx.Rngs(0))


def requests(vocab: int, count: int, longest: int, most: int) -> tuple[list[np.ndarray], list[int]]:
    """Return prompts of random lengths and the limits of their answers."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab, int(length)) for length in rng.integers(1, longest + 1, count)]
    return prompts, [int(limit) for limit in rng.integers(most // 2, most + 1, count)]


def live_bytes() -> int:
    """Return the bytes of all arrays alive, each buffer once."""
    found = {shard.data.unsafe_buffer_pointer(): shard.data.nbytes for x in jax.live_arrays() for shard in _shards(x)}
    return sum(found.values())


def _shards(x: Any) -> list[Any]:
    return [] if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else list(x.addressable_shards)


def throughput(model: Any, prompts: list[np.ndarray], limits: list[int], rows: int) -> float:
    """Return tokens a second."""
    start = time.perf_counter()
    answers = model.generate_many(prompts, max_new_tokens=limits, batch_size=rows)
    return sum(map(len, answers)) / (time.perf_counter() - start)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a measurement (default 64)")
    parser.add_argument("--longest", type=int, default=16, help="tokens of the longest prompt (default 16)")
    parser.add_argument("--most", type=int, default=144, help="tokens of the longest answer (default 144)")
    parser.add_argument("--memory", type=int, default=200, help="prompts while memory is watched (0: not)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a check of this script, no measurement")
    options = parser.parse_args()
    shape = TINY if options.tiny else SMOLLM2_135M
    model = model_of(shape)
    prompts, limits = requests(shape.vocab_size, options.prompts, options.longest, options.most)
    few = 2  # one by one takes long: as many prompts as make a rate
    found: dict[int, list[float]] = {1: [], 16: []}
    for turn in range(options.rounds + 1):
        for rows, count in ((1, few), (16, options.prompts)):
            rate = throughput(model, prompts[:count], [*limits[: count - 1], options.most], rows)
            if turn:  # the first compiles
                found[rows].append(rate)
    one, many = (statistics.median(found[rows]) for rows in (1, 16))
    ratio = statistics.median(b / a for a, b in zip(found[1], found[16], strict=True))
    print(f"{shape.name}: {one:.1f} tokens/s in 1 row, {many:.1f} in 16; {ratio:.2f} times (median of rounds)")
    if options.memory:
        prompts, limits = requests(shape.vocab_size, options.memory, options.longest, options.most)
        seen = [live_bytes() for _ in model.iterate_many(prompts, max_new_tokens=limits)]
        print(f"live arrays: {min(seen) / 1e6:.2f} to {max(seen) / 1e6:.2f} MB over {len(seen)} answers")


if __name__ == "__main__":
    main()
