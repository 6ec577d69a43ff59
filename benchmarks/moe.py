"""Compare a Mixtral on a CPU with transformers: `python -m benchmarks.moe`.

Random checkpoints in float32 with 8 and with 32 experts, made in a temporary directory; both libraries in one process,
in interleaved rounds. transformers runs twice: with the experts' implementation it chooses and with its plain loop.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import easydel
from benchmarks import report
from benchmarks.rounds import Result, interleave, seconds

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.05,  # so that logits, and the choice of experts, are not all alike
    "eos_token_id": None,
}
THEIRS = {"transformers": "grouped_mm", "transformers eager": "eager"}
TOLERANCE = 1e-4  # float32 in two libraries, relative to the largest number
NEW_TOKENS = 32


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each (default 9)")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32], help="how many experts (default 8 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens of the sequence (default 512)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    return parser.parse_args()


def load(folder: str, experts: int) -> tuple[dict[str, Any], Any]:
    """Return transformers' model once per implementation of experts, and ours, with the same random weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=experts)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    theirs = {}
    for name, implementation in THEIRS.items():
        theirs[name] = transformers.MixtralForCausalLM.from_pretrained(folder).eval()
        theirs[name].set_experts_implementation(implementation)
    return theirs, easydel.MixtralForCausalLM.from_pretrained(folder)


def phases(theirs: dict[str, Any], ours: Any, ids: np.ndarray) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return what is measured: title → contestant → the work, which returns an array of floats or tokens."""
    tensor = torch.from_numpy(ids).long()
    pure, params = ours.pure_transform_fn(), ours.params
    run = jax.jit(lambda params, ids: pure(params, {"input_ids": ids}).logits)
    gradient = jax.jit(jax.value_and_grad(lambda params, ids: pure(params, {"input_ids": ids, "labels": ids}).loss))

    @torch.inference_mode()
    def forward(model: Any) -> Any:
        return model(tensor, use_cache=False).logits

    def backward(model: Any) -> Any:
        model.zero_grad()
        loss = model(tensor, labels=tensor, use_cache=False).loss
        loss.backward()
        return loss.detach()

    @torch.inference_mode()
    def decode(model: Any) -> Any:
        mask = torch.ones_like(tensor[:, :8])
        return model.generate(tensor[:, :8], attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)

    def both(work: Callable[[Any], Any], mine: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        return {name: functools.partial(work, model) for name, model in theirs.items()} | {report.OURS: mine}

    return {
        "forward": both(forward, lambda: jax.block_until_ready(run(params, ids))),
        "loss and gradients": both(backward, lambda: jax.block_until_ready(gradient(params, ids))[0]),
        f"generate {NEW_TOKENS} tokens": both(
            decode, lambda: ours.generate(ids[:, :8], max_new_tokens=NEW_TOKENS, do_sample=False).sequences
        ),
    }


def check_equal(title: str, tasks: dict[str, Callable[[], Any]]) -> float:
    """Return the largest relative difference from transformers' numbers; raise if it is too large."""
    want, *others = (np.asarray(task()) for task in tasks.values())
    error = max(float(np.abs(got - want).max() / np.abs(want).max()) for got in others)
    if error > TOLERANCE:
        raise SystemExit(f"{title}: results differ by {error:.1e} of the largest number; nothing was measured")
    return error


def speed(work: Callable[[], Any], tokens: int) -> float:
    """Return how many tokens a second some work gets through."""
    return tokens / seconds(work)


def measure(experts: int, length: int, rounds: int) -> tuple[list[Result], list[str]]:
    """Measure models with so many experts; return the results and a note on their equality."""
    ids = np.random.default_rng(0).integers(4, SHAPE["vocab_size"], (1, length)).astype(np.int32)
    results, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = load(folder, experts)
    for title, tasks in phases(theirs, ours, ids).items():
        errors.append(f"{title} {check_equal(title, tasks):.0e}")
        tokens = NEW_TOKENS if title.startswith("generate") else length
        speeds = {name: functools.partial(speed, work, tokens) for name, work in tasks.items()}
        results.append(Result(f"{experts} experts, {title}", "tokens/s", values=interleave(speeds, rounds)))
        print(report.summary(results[-1]), flush=True)
    return results, [f"{experts} experts, largest relative difference: {', '.join(errors)}."]


def main() -> None:
    """Measure and report."""
    options = arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("jax").setLevel(logging.ERROR)
    about = report.environment()
    results: list[Result] = []
    notes = [
        f"Medians (least-most) of {options.rounds} interleaved rounds; {SHAPE}, batch 1 of {options.length} tokens, "
        f"random weights, float32; {about['cores']} cores of {about['processor']}, load average before "
        f"{about['load_average'][0]:.1f}.",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + f", Python {about['python']}.",
    ]
    for experts in options.experts:
        found, equal = measure(experts, options.length, options.rounds)
        results, notes = results + found, notes + equal
    table = report.rows(results, [*THEIRS, report.OURS], list(THEIRS))
    for row, result in zip(table[1:], results, strict=True):
        row[-len(THEIRS) :] = [f"{result.paired_ratio(report.OURS, name):.2f}" for name in THEIRS]
    notes.append("Ratios are medians of the rounds' own ratios.")
    report.show(table, notes)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(report.markdown(table, notes))


if __name__ == "__main__":
    main()
