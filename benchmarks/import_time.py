"""Seconds of imports, each in fresh interpreters: `python -m benchmarks.import_time [--rounds 5]`."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from functools import partial

from benchmarks.rounds import interleave

STATEMENTS = (
    "import easydel",
    "import jax",
    "import flax.nnx",
    "from easydel import EasyDeLBaseModule",
    "from easydel import AutoEasyDeLModelForCausalLM",
    "from easydel import LlamaForCausalLM",
)
CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def once(statement: str) -> float:
    """Return the seconds of a statement in a fresh interpreter, its start not counted."""
    done = subprocess.run([sys.executable, "-c", CODE.format(statement)], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each statement."""
    return interleave({statement: partial(once, statement) for statement in STATEMENTS}, rounds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    for statement, values in measure(parser.parse_args().rounds).items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{statement:50} {statistics.median(values):6.2f} s  ({spread})")


if __name__ == "__main__":
    main()
