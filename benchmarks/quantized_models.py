"""Quantized models against float ones: `python -m benchmarks.quantized_models`.

On a CPU: decoding and a prompt of 256 tokens at SmolLM2-135M's shape, in float32, 8bit and nf4; then what each method
costs the embedded model in perplexity, and its layers in bytes. `EASYDEL_NATIVE=0` measures without the kernels in
C++. On a GPU: decoding at Llama-3.2-1B's shape in bfloat16 and nf4. A figure that has a bar is printed beside it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

from benchmarks import report
from benchmarks.bars import Bar
from benchmarks.checkpoint import LLAMA_1B, SMOLLM2_135M, TINY, Shape, model_bytes, temporary_checkpoints
from benchmarks.contestants import EasyDeL
from benchmarks.phases import PHASES, Plan
from benchmarks.rounds import Result

FLOAT = "float"


class Quantized(EasyDeL):
    """This library with quantized layers; the tied head stays as it is."""

    def __init__(self, method: str | None, dtype: str, cache: str | None = None) -> None:
        super().__init__(dtype)
        self.method, self.cache = method, cache
        self.name = (method or FLOAT) + (" with int8 cache" if cache else "")

    def load(self, path: Path) -> None:
        """See `Contestant.load`."""
        super().load(path)
        if self.method:
            self.model.quantize(self.method)

    def generate(self, ids: Any, count: int) -> Any:
        """See `Contestant.generate`."""
        options = {"cache_implementation": self.cache} if self.cache else {}
        out = self.model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, **options)
        return np.asarray(out.sequences)[:, ids.shape[1] :]


def speed_bars(results: list[Result], on_gpu: bool, kernels: bool) -> list[Bar]:
    """Return each phase's ratio to the floats of the same round, with its bar where it has one."""
    least = {"decode": 0.5 if not kernels else 1.5, "prefill": 0.9}
    bars = []
    for result in results:
        phase = result.title.split(",")[0].split(" ")[0]
        for name in result.values:
            if name == FLOAT:
                continue
            wanted: float | None = 2.0 if on_gpu and phase == "decode" else None if on_gpu else least[phase]
            if "cache" in name or (phase == "decode" and name == "nf4" and not (kernels or on_gpu)):
                wanted = None  # reported only
            bars.append(Bar(f"{result.title}: {name} ÷ {FLOAT}", result.paired_ratio(name, FLOAT), least=wanted))
    return bars


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--parts", nargs="+", choices=("decode", "prefill", "quality"), help="what to measure")
    parser.add_argument("--methods", nargs="+", default=None, help="methods whose speed is measured")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (default 256)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode (default 64)")
    parser.add_argument("--int8-cache", action="store_true", help="measure floats with an int8 cache, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a check of this script, no measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table and the bars")
    return parser.parse_args()


def speeds(
    shape: Shape, options: argparse.Namespace, phases: list[str], methods: list[str]
) -> tuple[list[Result], int]:
    """Measure tokens a second in interleaved rounds; return them and the float model's bytes."""
    everybody: list[Any] = [Quantized(method, shape.dtype) for method in (None, *methods)]
    if options.int8_cache:
        everybody.append(Quantized(None, shape.dtype, cache="quantized"))
    with temporary_checkpoints(shape, TINY) as (path, tiny):
        plan = Plan(
            path, tiny, shape.vocab_size, options.rounds, prompt=options.prompt, new_tokens=options.new_tokens
        )  # fmt: skip
        return [result for phase in phases for result in PHASES[phase](everybody, plan)], model_bytes(path)


def main() -> None:
    """Measure and report."""
    options = arguments()
    import jax

    from benchmarks.cpu import quiet
    from easydel import native

    quiet()
    on_gpu, kernels = jax.default_backend() == "gpu", native.is_available()
    parts = options.parts or (["decode", "prefill"] if on_gpu else ["decode", "prefill", "quality"])
    methods = options.methods or (["nf4"] if on_gpu else ["8bit", "nf4"])
    shape = TINY if options.tiny else LLAMA_1B if on_gpu else SMOLLM2_135M
    about, results, bars, size = report.environment(), [], [], 0
    if phases := [part for part in parts if part != "quality"]:
        results, size = speeds(shape, options, phases, methods)
        bars = speed_bars(results, on_gpu, kernels)
    if "quality" in parts:
        from benchmarks.quantized_quality import measured

        bars += measured(quick=options.tiny)
    notes = [
        f"Medians (least-most) of {options.rounds} interleaved rounds; {shape.name}'s shape, random weights, "
        f"{shape.dtype}, {size / 1e6:.0f} MB; {jax.devices()[0].device_kind}, {about['cores']} cores of "
        f"{about['processor']}, load average before {about['load_average'][0]:.1f}, after {os.getloadavg()[0]:.1f}; "
        f"kernels in C++ {'on' if kernels else 'off'}. Ratios are medians of the rounds' own.",
        *map(str, bars),
    ]
    table = report.rows(results, list(results[0].values) if results else [], [])
    report.show(table, notes)
    if options.markdown:
        options.markdown.write_text(report.markdown(table, [f"- {note}" for note in notes]))


if __name__ == "__main__":
    main()
