"""A tiny Llama checkpoint made by hand, without any model: what the tests of this folder break, bend and serve."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.hub.safetensors import header_bytes
from easydel.paths import named_variables

HIDDEN, HEADS, MLP, VOCAB, LAYERS = 8, 2, 12, 16, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1,
    "max_position_embeddings": 32, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors(seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return name → array of a whole causal language model."""
    random, shapes = np.random.default_rng(seed), {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (4, HIDDEN), "self_attn.v_proj": (4, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
            "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def file_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file."""
    table = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    return header_bytes(table, metadata or {}) + b"".join(array.tobytes() for array in arrays.values())


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write(folder: Path, arrays: Mapping[str, np.ndarray] | None = None, **config: Any) -> Path:
    """Write config and a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, **config)
    (folder / SINGLE).write_bytes(file_bytes(tensors() if arrays is None else arrays))
    return folder


def write_sharded(
    folder: Path, arrays: Mapping[str, np.ndarray], names: tuple[str, str] = ("a", "b")
) -> dict[str, str]:
    """Replace the weights by two shards and an index; return its weight map."""
    write_config(folder)
    (folder / SINGLE).unlink(missing_ok=True)
    items = list(arrays.items())
    weight_map = {}
    for name, part in zip(names, (dict(items[:9]), dict(items[9:])), strict=True):
        (folder / f"{name}.safetensors").write_bytes(file_bytes(part))
        weight_map |= dict.fromkeys(part, f"{name}.safetensors")
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def loaded(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return checkpoint name → array of a loaded model, spelled out here and not by the weight map under test."""
    found = {}
    for path, variable in named_variables(model, nnx.Param).items():
        array = np.asarray(variable.get_value())
        head, _, leaf = path.rpartition("/")
        found[head.replace("/", ".") + ".weight"] = array.T if leaf == "kernel" else array
    return found


def assert_equal(model: nnx.Module, want: Mapping[str, np.ndarray]) -> None:
    """Check every value, bit for bit."""
    got = loaded(model)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name].astype(np.float64), array.astype(np.float64), err_msg=name)


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return name → (size, time) of every file below a folder, and its folders."""
    found = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    return {
        str(path.relative_to(folder)): (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
        for path, status in found.items()
    }


def live_bytes() -> int:
    """Return the bytes of all arrays that jax holds."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())
