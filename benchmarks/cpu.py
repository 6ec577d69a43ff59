"""Compare this library on a CPU with transformers and a hand-written JAX Llama: `python -m benchmarks.cpu`.

A random checkpoint of SmolLM2-135M's shape in float32, made in a temporary directory; everybody in one process, in
interleaved rounds. See benchmarks/README.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

from benchmarks import report
from benchmarks.checkpoint import SMOLLM2_135M, TINY, model_bytes, temporary_checkpoints
from benchmarks.contestants import contestants
from benchmarks.phases import MEMORY, PHASES, Plan, check_equal
from benchmarks.rounds import Result

COLUMNS = ("transformers", "transformers forward", "hand-written JAX", "easydel")
OTHERS = ("transformers", "hand-written JAX")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="what to measure")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: a check of this script, no measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the README's table")
    return parser.parse_args()


def quiet() -> None:
    """Silence progress bars and notices of the contestants."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Some donated buffers were not usable")


def decode_limit(results: list[Result], size: int) -> list[str]:
    """Relate decoding to the bandwidth of the memory, which every token's weights must pass."""
    found = [result for result in results if MEMORY in result.values]
    if not found:
        return []
    reads, share = found[0].median(MEMORY), found[0].paired_ratio(report.OURS, MEMORY)
    return [
        f"Reading {size / 1e6:.0f} MB of weights a token at {reads * size / 1e9:.0f} GB/s, measured in the same "
        f"rounds, allows {reads:.0f} tokens/s; easydel's decode reaches {share:.0%} of that."
    ]


def main() -> None:
    """Measure and report."""
    options = arguments()
    quiet()
    shape = TINY if options.tiny else SMOLLM2_135M
    about = report.environment() | {"shape": vars(shape), "rounds": options.rounds}
    with temporary_checkpoints(shape, TINY) as (path, tiny):
        plan = Plan(path, tiny, shape.vocab_size, options.rounds, measures_memory=True)
        everybody = contestants()
        for one in everybody:
            one.load(path)
        about["logit_differences"] = check_equal(everybody, plan)
        results: list[Result] = []
        for name in options.phases:
            start = time.perf_counter()
            found = PHASES[name](everybody, plan)
            results += found
            print(f"{name}: {time.perf_counter() - start:.0f} s", *map(report.summary, found), sep="\n  ", flush=True)
        size = model_bytes(path)
    notes = [
        f"Medians (least-most) of {options.rounds} interleaved rounds; {shape.name}'s shape, random weights, "
        f"{shape.dtype}, {size / 1e6:.0f} MB; {about['cores']} cores of {about['processor']}, load average before "
        f"{about['load_average'][0]:.1f}; files in the page cache.",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()) + f", Python {about['python']}.",
        *decode_limit(results, size),
    ]
    columns = [name for name in COLUMNS if any(name in result.values for result in results)]
    table = report.rows(results, columns, OTHERS)
    report.show(table, notes)
    if options.json:
        options.json.write_text(json.dumps(report.as_json(results, about), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(table, notes))


if __name__ == "__main__":
    main()
