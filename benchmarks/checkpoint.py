"""Random checkpoints, written by transformers itself."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The size of a Llama."""

    name: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    rope_theta: float = 100_000.0
    dtype: str = "float32"

    def config(self) -> Any:
        """Return the transformers config. No token ends a text, so that everybody makes the same number of tokens."""
        from transformers import LlamaConfig

        fields = {name: value for name, value in vars(self).items() if name not in ("name", "rope_theta", "dtype")}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        return LlamaConfig(
            **fields, **ends, rope_parameters=rope, rms_norm_eps=1e-5, max_position_embeddings=8192,
            tie_word_embeddings=True, initializer_range=0.04,
        )  # fmt: skip


SMOLLM2_135M = Shape("SmolLM2-135M", 49152, 576, 30, 9, 3, 1536)
LLAMA_1B = Shape("Llama-3.2-1B", 128256, 2048, 16, 32, 8, 8192, 500_000.0, "bfloat16")
TINY = Shape("tiny", 512, 48, 2, 6, 2, 96)


@contextlib.contextmanager
def temporary_checkpoints(*shapes: Shape) -> Iterator[list[Path]]:
    """Write a random checkpoint of each shape into a directory that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="easydel-benchmark-") as folder:
        yield [_write(shape, Path(folder) / str(number)) for number, shape in enumerate(shapes)]


def _write(shape: Shape, path: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config(), dtype=getattr(torch, shape.dtype))
    model.save_pretrained(path)
    return path


def model_bytes(path: Path) -> int:
    """Return the bytes that the checkpoint's tensors take."""
    total = 0
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            total += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    return total
