"""Training data: how fast a large file is indexed, documents are tokenised and packed, and how little padding is left.

Packing is compared with grain's own first-fit packing of the same documents into as many open rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import grain
import numpy as np

from benchmarks import report
from easydel.assets import embedded_model_path, embedded_text_path
from easydel.cli.text import load_tokenizer
from easydel.training.data import DataConfig, make_loader
from easydel.training.data.documents import Window
from easydel.training.data.files import index_file
from easydel.training.data.packing import Packer, Placed

LENGTH, OPEN_ROWS = 1024, 16


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200, help="size of the file (default: 200)")
    parser.add_argument("--batches", type=int, default=100, help="batches made of it (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="times everything is measured (default: 3)")
    return parser.parse_args()


def write_lines(path: Path, megabytes: int) -> None:
    """Write JSON lines of 20 to 300 words."""
    random = np.random.default_rng(0)
    words = np.array(embedded_text_path().read_text(encoding="utf-8").split())
    left = megabytes * 1_000_000
    with path.open("w") as file:
        while left > 0:
            left -= file.write(json.dumps({"text": " ".join(random.choice(words, random.integers(20, 300)))}) + "\n")


def padding_shares(lengths: np.ndarray) -> tuple[float, float]:
    """Return the share of padding of our packing and of grain's."""
    packer, rows = Packer(LENGTH, OPEN_ROWS), 0
    for number, length in enumerate(lengths):
        ids = np.zeros(length, np.int32)
        rows += len(packer.add(Placed((number, 0), Window(ids, ids))))
    rows += len(packer.flush())
    documents = grain.MapDataset.source([{"ids": np.zeros(length, np.int32)} for length in lengths])
    theirs = grain.experimental.FirstFitPackIterDataset(
        documents.to_iter_dataset(), length_struct={"ids": LENGTH}, num_packing_bins=OPEN_ROWS
    )
    return tuple(1 - lengths.sum() / (LENGTH * count) for count in (rows, sum(1 for _ in theirs)))


def main() -> None:
    """Measure and print."""
    options = arguments()
    about = report.environment()
    print(f"{about['cores']} cores of {about['processor']}, load average {about['load_average'][0]:.1f}")
    tokenizer = load_tokenizer(embedded_model_path())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        write_lines(path, options.megabytes)
        for _ in range(options.rounds):
            start = time.perf_counter()
            lines = len(index_file(path, b"\n"))
            indexed = time.perf_counter() - start
            with make_loader(
                DataConfig(path=path, sequence_length=LENGTH, prefetch=0), tokenizer, batch_size=8
            ) as loader:
                start = time.perf_counter()
                for _ in range(options.batches):
                    next(loader)
                rate = loader.statistics.tokens / (time.perf_counter() - start)
            print(
                f"{lines:,} lines, {options.megabytes} MB: indexed in {indexed:.2f} s; {rate:,.0f} tokens/s", end="; "
            )
            print(f"state of {len(json.dumps(loader_state(path, tokenizer))):,} characters")
    random = np.random.default_rng(0)
    for name, lengths in (
        ("log-normal around 200 tokens", np.clip(random.lognormal(5.3, 0.9, 6000).astype(int), 2, LENGTH)),
        ("uniform", random.integers(2, LENGTH + 1, 6000)),
    ):
        ours, theirs = padding_shares(lengths)
        print(f"lengths {name}: padding {ours:.1%}, grain's first-fit packing {theirs:.1%}")


def loader_state(path: Path, tokenizer: object) -> dict:
    """Return the state after some batches."""
    with make_loader(DataConfig(path=path, sequence_length=LENGTH), tokenizer, batch_size=8) as loader:
        for _ in range(10):
            next(loader)
        return loader.get_state()


if __name__ == "__main__":
    main()
