"""Compare this library on a GPU with transformers on the same card, and both with what the card can do.

`python -m benchmarks.gpu` runs a random Llama of Llama-3.2-1B's shape in bfloat16. The card's limits are measured, not
looked up: the rate of a large bfloat16 matrix product, and of streaming through memory. Without a GPU it says so and
ends; `--tiny` runs its logic anywhere, on a tiny model. Without a CUDA build of PyTorch, transformers is left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share the card

from benchmarks import report
from benchmarks.checkpoint import LLAMA_1B, TINY, Shape, model_bytes, temporary_checkpoints
from benchmarks.contestants import EasyDeL, Transformers
from benchmarks.phases import PHASES, Plan, check_equal
from benchmarks.rounds import Result, seconds

COLUMNS = ("transformers", "transformers forward", "easydel")
# bfloat16 keeps 8 bits: two right implementations differ by about this share of the largest logit.
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}


def card_limits(tiny: bool) -> dict[str, float]:
    """Measure bfloat16 matrix products (flop/s) and reading memory (bytes/s): the best of ten."""
    import jax
    import jax.numpy as jnp

    size, length = (256, 1 << 16) if tiny else (8192, 1 << 30)
    a = jnp.ones((size, size), jnp.bfloat16)
    x = jnp.ones((length,), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    read = jax.jit(lambda x: x.max())

    def best(work: Any, argument: Any) -> float:
        jax.block_until_ready(work(argument))
        return min(seconds(lambda: jax.block_until_ready(work(argument))) for _ in range(10))

    return {"matmul_flops": 2 * size**3 / best(product, a), "memory_bytes": x.nbytes / best(read, x)}


def shares(results: list[Result], limits: dict[str, float], shape: Shape, size: int) -> list[str]:
    """Say how near each phase comes to the card's limits.

    A token costs two operations a parameter forward and six in training, attention aside; the embedding's lookup is
    free, but tied it is the head. A decoded token reads every weight once.
    """
    width = 2 if shape.dtype == "bfloat16" else 4
    parameters = size / width
    layers_only = parameters - shape.vocab_size * shape.hidden_size  # a prompt needs the head once only
    lines = []
    for result in results:
        if report.OURS not in result.values:
            continue
        speed = result.median(report.OURS)
        if result.title.startswith("prefill"):
            lines.append(f"prefill: {2 * layers_only * speed / limits['matmul_flops']:.0%} of the matmul limit")
        elif result.title.startswith("training"):
            lines.append(f"training: {6 * parameters * speed / limits['matmul_flops']:.0%} of the matmul limit")
        elif result.title.startswith("decode"):
            lines.append(f"decode: {speed * size / limits['memory_bytes']:.0%} of the memory limit")
    return ["easydel reaches: " + "; ".join(lines)] if lines else []


def contestants(shape: Shape, on_gpu: bool) -> list[Any]:
    """Return transformers, if its PyTorch can use the device, and ours."""
    import torch

    everybody: list[Any] = [EasyDeL(shape.dtype)]
    if not on_gpu or torch.cuda.is_available():
        everybody.insert(0, Transformers(shape.dtype, "cuda" if on_gpu else "cpu"))
    return everybody


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = [name for name in PHASES if name != "peak"]  # host memory says nothing of a card
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases, help="what to measure")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default 2048)")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens to decode (default 256)")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 1024), metavar=("ROWS", "TOKENS"), help="to train on")
    parser.add_argument("--tiny", action="store_true", help="a tiny float32 model on any device: a check of the script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    options = arguments()
    import jax

    from benchmarks.cpu import quiet

    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not options.tiny:
        raise SystemExit(
            f"benchmarks.gpu: jax sees no GPU (backend {jax.default_backend()!r}); install 'easydel-base[cuda]' on a "
            "machine that has one, or check the script with --tiny"
        )
    quiet()
    shape = TINY if options.tiny else LLAMA_1B
    limits = card_limits(options.tiny)
    about = report.environment() | {
        "device": jax.devices()[0].device_kind, "shape": vars(shape), "rounds": options.rounds, "limits": limits
    }  # fmt: skip
    with temporary_checkpoints(shape, TINY) as (path, tiny):
        plan = Plan(
            path, tiny, shape.vocab_size, options.rounds,
            prompt=options.prompt, new_tokens=options.new_tokens, batch=tuple(options.batch),
            loss_tolerance=1e-3 if shape.dtype == "float32" else 2e-2,
        )  # fmt: skip
        everybody = contestants(shape, on_gpu)
        for one in everybody:
            one.load(path)
        # Rounded differently, greedy tokens part sooner or later: in bfloat16 only logits are compared.
        about["logit_differences"] = check_equal(
            everybody, plan, TOLERANCE[shape.dtype], tokens=shape.dtype == "float32"
        )
        results = [result for name in options.phases for result in PHASES[name](everybody, plan)]
        size = model_bytes(path)
    notes = [
        f"Medians (least-most) of {options.rounds} interleaved rounds; {shape.name}'s shape, random weights, "
        f"{shape.dtype}, {size / 1e6:.0f} MB; {about['device']}: {limits['matmul_flops'] / 1e12:.1f} Tflop/s in "
        f"bfloat16 products and {limits['memory_bytes'] / 1e9:.0f} GB/s of memory, measured.",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + f", Python {about['python']}.",
        *shares(results, limits, shape, size),
    ]
    columns = [name for name in COLUMNS if any(name in result.values for result in results)]
    table = report.rows(results, columns, ["transformers"] if "transformers" in columns else [])
    report.show(table, notes)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(results, about), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(table, notes))


if __name__ == "__main__":
    main()
