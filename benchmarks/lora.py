"""LoRA of the 135M shape: time of a training step, bytes of optimizer and parameters, time of exchanging adapters.

Rank 8 on `q_proj` and `v_proj`, AdamW, random tokens; steps in interleaved rounds. Bars: a step takes at most 0.8 times
that of full fine-tuning, an exchange of adapters at most 5 ms and compiles nothing, parameters over an NF4
base take at most 0.4 times the bytes of those over a float32 base.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import report
from benchmarks.rounds import Result, interleave
from easydel import CompilationCounter, LlamaConfig, LlamaForCausalLM, LoraConfig
from easydel.paths import named_variables
from easydel.training.step import TrainStep

SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
PATTERN = ".*q_proj.*|.*v_proj.*"
FULL, LORA = "full fine-tuning", "LoRA"
STEP_BAR, SWAP_BAR, MEMORY_BAR = 0.8, 5e-3, 0.4


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a row (default: 256)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch (default: 2)")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model (default: 30)")
    parser.add_argument("--scan", action="store_true", help="layers stored stacked, run by a scan")
    return parser.parse_args()


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    """Build the model with random weights."""
    fields = SHAPE | {"num_hidden_layers": options.layers, "scan_layers": options.scan}
    return LlamaForCausalLM(LlamaConfig(**fields), rngs=nnx.Rngs(0))


def lora(model: Any) -> Any:
    """Give a model the adapters."""
    return model.apply_lora_to_layers(8, 16, PATTERN)


def held_bytes(model: Any) -> int:
    """Return the bytes of all that a model's files or adapters hold."""
    arrays = [v.get_value() for v in named_variables(model, by_layer=False).values() if not isinstance(v, nnx.RngState)]
    return sum(array.size * array.dtype.itemsize for array in arrays)


def main() -> None:
    """Measure and report."""
    options = arguments()
    about = report.environment()
    print(f"{about['cores']} cores of {about['processor']}, load average {about['load_average'][0]:.1f}")
    tokens = np.random.default_rng(0).integers(4, SHAPE["vocab_size"], (options.rows, options.tokens)).astype(np.int32)
    batch = {"input_ids": tokens, "labels": tokens}

    steps, processors = {}, Result("of all cores", "s", higher_is_better=False, values={FULL: [], LORA: []})
    for name, model in ((FULL, build(options)), (LORA, lora(build(options)))):
        state = model.to_state(optax.adamw(1e-4))
        print(f"{name}: {state.summary()}")
        if name == LORA:
            adapters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.trainable_params))
            moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
            print(f"  adapters {adapters:,} bytes, moments {moments:,} bytes ({moments / adapters:g} times)")
        steps[name] = TrainStep(state, keep=False)

    def task(name: str) -> Callable[[], float]:
        def run() -> float:
            before, began = time.process_time(), time.perf_counter()
            jax.block_until_ready(steps[name](batch))
            wall = time.perf_counter() - began
            processors.values[name].append(time.process_time() - before)
            return wall

        return run

    timing = Result("training step", "s", higher_is_better=False)
    timing.values = interleave({name: task(name) for name in steps}, options.rounds)
    processors.values = {name: values[-options.rounds :] for name, values in processors.values.items()}
    print(
        f"{report.summary(timing)}; LoRA {timing.paired_ratio(LORA, FULL):.2f} of full (bar: {STEP_BAR}), "
        f"{processors.paired_ratio(LORA, FULL):.2f} of its processor time"
    )
    steps.clear()

    model = lora(build(options))
    whole = held_bytes(model)
    model.add_adapter("other", LoraConfig(8, 4, PATTERN))
    for name in ("other", "default"):
        model.set_adapter(name)
    taken = []
    with CompilationCounter() as counter:
        for name in ("other", "default") * 20:
            began = time.perf_counter()
            model.set_adapter(name)
            taken.append(time.perf_counter() - began)
    print(
        f"exchange of adapters: median {1e3 * float(np.median(taken)):.2f} ms, least {1e3 * min(taken):.2f} ms "
        f"(bar: {1e3 * SWAP_BAR:.0f} ms), {counter.count} compilations"
    )
    small = held_bytes(lora(build(options).quantize("nf4")))
    sizes = f"{whole / 2**20:.0f} MiB, over NF4 {small / 2**20:.0f} MiB"
    print(f"parameters: {sizes}, {small / whole:.3f} (bar: {MEMORY_BAR})")


if __name__ == "__main__":
    main()
