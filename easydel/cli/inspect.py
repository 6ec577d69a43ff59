"""`easydel inspect`: what a checkpoint holds, from its config and the headers of its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from easydel.cli.tables import bytes_text, count_text, group_parameters, parameter_table
from easydel.infra.source import model_class, read_config

# Fields that say most about a model; those that a config lacks are left out.
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rope_parameters",
    "tie_word_embeddings", "dtype",
)  # fmt: skip


def run_inspect(source: str) -> None:
    """Print a checkpoint's config, parameters and memory.

    Args:
        source: a folder or a Hub id; of a Hub id only the config and the headers are fetched.
    """
    config = read_config(source)
    tensors = read_tensors(source)
    console = Console(highlight=False)
    console.print(config_table(source, config))
    arrays, specs = by_parameter(config, tensors)
    console.print()
    console.print(parameter_table(group_parameters(arrays, specs)))
    console.print()
    console.print(memory_table(config, tensors))


def run_sharding(source: str, mesh: str | None, *, picture: Path | None = None, as_json: bool = False) -> None:
    """Print what the partition rules of a checkpoint's family make of it on a mesh, and why.

    Args:
        source: a folder or a Hub id; of a Hub id only the config and the headers are fetched.
        mesh: such as `fsdp=4,tp=2`; the mesh need not exist here.
        picture: a `.png` or `.html` file to draw it into.
        as_json: print a dictionary instead of tables.
    """
    from easydel.sharding import parse_mesh
    from easydel.sharding.explain_text import WIDTH, tables

    if mesh is None:
        raise ValueError("--sharding needs a mesh: --mesh fsdp=4,tp=2")
    parsed = parse_mesh(mesh)
    explanation = as_stored(read_config(source), read_tensors(source)).explain_sharding(mesh=parsed)
    if picture is not None:
        explanation.save(picture)
    if as_json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        width = None if sys.stdout.isatty() else WIDTH  # a file or pipe needs no fitting in
        Console(highlight=False, width=width).print(tables(explanation))


def as_stored(config: Any, tensors: Mapping[str, Any]) -> Any:
    """Return the model of shapes, each parameter in the dtype in which it is stored."""
    from easydel.infra.construct import abstract_module
    from easydel.paths import named_variables
    from easydel.stacked import layer_paths

    model = abstract_module(model_class(config), config)
    stored, _ = by_parameter(config, tensors)
    for path, variable in named_variables(model, by_layer=False).items():
        if found := [stored[part].dtype for part in layer_paths(path) or [path] if part in stored]:
            variable.set_value(jax.ShapeDtypeStruct(variable.get_value().shape, jnp.result_type(*found)))
    return model


def read_tensors(source: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Return name → shape and dtype of a checkpoint's tensors, from the headers alone."""
    from easydel.hub.safetensors import DTYPES

    if Path(source).is_dir():
        from easydel.hub.resolve import checkpoint_table

        table = checkpoint_table(Path(source))
        return {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in table.items()}
    from huggingface_hub import get_safetensors_metadata

    files = get_safetensors_metadata(source).files_metadata.values()
    return {
        name: jax.ShapeDtypeStruct(tuple(info.shape), DTYPES[info.dtype])
        for file in files
        for name, info in file.tensors.items()
    }


def by_parameter(config: Any, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our parameter paths with shape and stored dtype, and their partition specs.

    Tensors that are no parameter of ours keep their own name, so that nothing in the file is passed over.
    """
    from easydel.hub.weight_map import build_links
    from easydel.infra.construct import abstract_module
    from easydel.paths import flatten

    model = abstract_module(model_class(config), config)
    specs = flatten(model._specs_sharding())
    arrays: dict[str, Any] = {}
    left = dict(tensors)
    for link in build_links(model):
        found = [left.pop(name) for name in link.sources if name in left]
        if found:
            for path, shape in zip(link.targets, link.target_shapes, strict=True):
                arrays[path] = jax.ShapeDtypeStruct(shape, found[0].dtype)
    return arrays | left, {path: specs[path] for path in arrays if path in specs}


def config_table(source: str, config: Any) -> Table:
    """Lay the main fields of a config out."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("checkpoint", str(source))
    table.add_row("family", f"{config.model_type} ({', '.join(config.architectures or ['no architecture named'])})")
    for name in FIELDS:
        value = getattr(config, name, None)
        if value is not None:
            table.add_row(name.replace("_", " "), str(value).removeprefix("torch."))
    return table


def memory_table(config: Any, tensors: Mapping[str, Any]) -> Table:
    """Say what the parameters take in the usual dtypes, and what a token of the cache takes."""
    size = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    stored = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in tensors.values())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("parameters", count_text(size))
    table.add_row("memory as stored", bytes_text(stored))
    table.add_row("memory in bfloat16 / float32", f"{bytes_text(2 * size)} / {bytes_text(4 * size)}")
    table.add_row("training with AdamW, float32", f"{bytes_text(16 * size)} (parameters, gradients, two moments)")
    heads, width = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    kept = 2 * heads * width if heads and width else 0
    if getattr(config, "kv_lora_rank", None):  # latents and one rotated part, whatever the heads
        kept = config.kv_lora_rank + config.qk_rope_head_dim
    if kept:
        table.add_row("cache of one token, bfloat16", bytes_text(2 * config.num_hidden_layers * kept))
    return table
