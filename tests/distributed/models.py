"""Small models and batches for the tests of several processes, and what they measure in each of them."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZES = dict(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None, bos_token_id=None, initializer_range=0.1,
)  # fmt: skip
FAMILIES = {"llama": {}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}}


def model_class(family: str) -> Any:
    import easydel

    return {"llama": easydel.LlamaForCausalLM, "mixtral": easydel.MixtralForCausalLM}[family]


def make_checkpoint(family: str, folder: Path) -> None:
    """Write a model with random weights, made on one device."""
    from flax import nnx

    cls = model_class(family)
    cls(cls.config_class(**SIZES | FAMILIES[family]), rngs=nnx.Rngs(0)).save_pretrained(folder)


def batch_of(number: int) -> dict[str, np.ndarray]:
    """Rows that count upwards, some of their labels masked, so that rows and processes count differently."""
    random = np.random.default_rng(number)
    ids = ((random.integers(0, 512, (8, 1)) + np.arange(16)) % 512).astype(np.int32)
    return {"input_ids": ids, "labels": np.where(random.random(ids.shape) < 0.2, -100, ids).astype(np.int32)}


def read_so_far() -> int:
    """Bytes that this process has asked the system for, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def share_of(model: Any) -> int:
    """Bytes of a model that this process's devices hold, each part once: what it has to read."""
    from easydel.paths import named_variables

    total = 0
    for variable in named_variables(model, by_layer=False).values():
        array = variable.get_value()
        blocks = array.sharding.addressable_devices_indices_map(array.shape).values()
        parts = {str(block) for block in blocks}
        total += len(parts) * int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
    return total


@contextlib.contextmanager
def shown() -> Iterator[io.StringIO]:
    """Collect what is written to standard output and error."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def opened_for_writing(folder: Path) -> list[str]:
    """Note from now on which files below a folder this process opens for writing, by their path there."""
    names: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | os.PathLike):
            return
        path, mode, flags = os.fspath(arguments[0]), arguments[1], arguments[2]
        writes = any(letter in (mode or "") for letter in "wax+") or (
            mode is None and flags & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and path.startswith(str(folder)):
            names.append(os.path.relpath(path, folder))

    sys.addaudithook(note)
    return names
