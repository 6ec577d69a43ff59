"""Layers stored stacked and run by a scan: what compiling costs as models get deeper, and what a step costs.

Compiling (tracing included) is measured on a narrow Llama of 8 and of 64 layers, a step on one wide enough for its
products to count. Bars: 64 layers compile in at most 1.5 times the time of 8; a step takes at most 1.05 times that of
layers one by one.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks import report
from benchmarks.rounds import Result, interleave, seconds
from easydel import LlamaConfig, LlamaForCausalLM

NARROW = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
WIDE = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
FORMS = {"scan": True, "one by one": False}
COMPILE_BAR, STEP_BAR = 1.5, 1.05


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--depths", type=int, nargs=2, default=[8, 64], help="layers compiled (default: 8 64)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the step that is timed (default: 12)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a row (default: 256)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated (default: 32)")
    return parser.parse_args()


def build(shape: dict[str, int], layers: int, scan: bool) -> LlamaForCausalLM:
    """Build a Llama with random weights."""
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, scan_layers=scan), rngs=nnx.Rngs(0))


def training_step(model: LlamaForCausalLM) -> Callable[[Any, Any], Any]:
    """Return one step of AdamW, to be compiled; the state given is used up."""
    pure = model.pure_transform_fn()

    def step(state: Any, ids: Any) -> tuple[Any, Any]:
        inputs = {"input_ids": ids, "labels": ids}
        loss, gradients = jax.value_and_grad(lambda params: pure(params, inputs).loss)(state.params)
        return state.apply_gradients(gradients), loss

    return step


def ids_of(shape: dict[str, int], tokens: int) -> np.ndarray:
    """Return one row of tokens."""
    return np.random.default_rng(0).integers(4, shape["vocab_size"], (1, tokens)).astype(np.int32)


def compile_seconds(model: LlamaForCausalLM) -> float:
    """Return how long tracing and compiling a training step takes."""
    state, ids = model.to_state(optax.adamw(1e-4)), ids_of(NARROW, 32)
    jax.clear_caches()
    return seconds(lambda: jax.jit(training_step(model), donate_argnums=0).lower(state, ids).compile())


def step_seconds(layers: int, tokens: int) -> dict[str, Callable[[], float]]:
    """Return, by form, a task that takes one step and says how long it took."""
    ids, losses = ids_of(WIDE, tokens), {}

    def task(name: str, scan: bool) -> Callable[[], float]:
        model = build(WIDE, layers, scan)
        compiled = jax.jit(training_step(model), donate_argnums=0)
        held = [model.to_state(optax.adamw(1e-4))]

        def run() -> float:
            start = time.perf_counter()
            held[0], loss = compiled(held[0], ids)
            jax.block_until_ready((held[0], loss))
            losses[name] = [*losses.get(name, []), float(loss)]
            if len(losses) == len(FORMS) and len({len(found) for found in losses.values()}) == 1:
                one, other = losses.values()
                np.testing.assert_allclose(one, other, rtol=1e-3, err_msg="the forms learn differently")
            return time.perf_counter() - start

        return run

    return {name: task(name, scan) for name, scan in FORMS.items()}


def generation_seconds(layers: int, new_tokens: int) -> dict[str, Callable[[], float]]:
    """Return, by form, a task that generates and says how long a token took; the tokens must be equal."""
    models, ids = {name: build(WIDE, layers, scan) for name, scan in FORMS.items()}, ids_of(WIDE, 16)

    def run(model: LlamaForCausalLM) -> Any:
        return jax.block_until_ready(model.generate(ids, max_new_tokens=new_tokens, do_sample=False).sequences)

    np.testing.assert_array_equal(*(run(model) for model in models.values()))
    return {
        name: lambda model=model: seconds(lambda: run(model)) / new_tokens  # type: ignore[misc]
        for name, model in models.items()
    }


def main() -> None:
    """Measure and report."""
    options = arguments()
    few, many = options.depths
    compiling = Result("compile a training step", "s", higher_is_better=False)
    for name, scan in FORMS.items():  # one by one it takes so long that once is enough to see it
        tasks = {f"{name}, {n}": functools.partial(compile_seconds, build(NARROW, n, scan)) for n in (few, many)}
        compiling.values |= interleave(tasks, options.rounds if scan else 1, 1 if scan else 0)
    stepping = Result("training step", "s", higher_is_better=False)
    stepping.values = interleave(step_seconds(options.layers, options.tokens), options.rounds, 2)
    generating = Result("generate", "s/token", higher_is_better=False)
    generating.values = interleave(generation_seconds(options.layers, options.new_tokens), options.rounds, 1)
    about = report.environment()
    print(f"{about['cores']} cores of {about['processor']}, load average {about['load_average'][0]:.1f}")
    for result in (compiling, stepping, generating):
        shown = {name: statistics.median(values) for name, values in result.values.items()}
        print(f"{result.title}: " + ", ".join(f"{name} {value:.4f} {result.unit}" for name, value in shown.items()))
    for name in FORMS:
        ratio = compiling.paired_ratio(f"{name}, {many}", f"{name}, {few}")
        print(f"compiling {many} layers over compiling {few}, {name}: {ratio:.2f} (bar of the scan: {COMPILE_BAR})")
    print(f"step of the scan over one by one: {stepping.paired_ratio(*FORMS):.3f} (bar: {STEP_BAR})")
    print(f"token of the scan over one by one: {generating.paired_ratio(*FORMS):.3f}")


if __name__ == "__main__":
    main()
