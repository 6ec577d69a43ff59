"""`python -m scripts.train_embedded`: corpus → tokenizer → training → the folder the package carries."""

from __future__ import annotations

import argparse
from pathlib import Path

from easydel.assets import embedded_model_path
from scripts.train_embedded.corpus import documents
from scripts.train_embedded.publish import publish
from scripts.train_embedded.tokenizer import save_tokenizer, train_tokenizer
from scripts.train_embedded.train import CONTEXT, Recipe, Run, encode


def main() -> None:
    """Train, or take an unfinished run up again, and write the model with its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--run", type=Path, default=Path("runs/embedded"), help="folder of the run's checkpoints")
    parser.add_argument("--output", type=Path, default=embedded_model_path(), help="folder of the model")
    options = parser.parse_args()

    corpus = documents()
    train = [document for document in corpus if not document.is_validation]
    validation = [document for document in corpus if document.is_validation]
    tokenizer = train_tokenizer(document.text for document in train)
    save_tokenizer(tokenizer, options.output, CONTEXT)
    run = Run(
        Recipe(steps=options.steps), tokenizer, encode(tokenizer, train), encode(tokenizer, validation), options.run
    )
    print(f"{len(corpus)} documents, {len(run.train):,} tokens to train on, {len(run.validation):,} to validate on")
    publish(run, run.go(), validation, options.output)


if __name__ == "__main__":
    main()
