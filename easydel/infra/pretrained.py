"""From a name to a model: config, class, weights; and from a model to its files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from huggingface_hub.errors import StrictDataclassError

from easydel.errors import CheckpointError, UnsupportedError
from easydel.hub.abstract import build_abstract
from easydel.hub.fields import check_config, check_content, check_depth, decode_floats
from easydel.hub.inner import inner_config
from easydel.hub.load import load_module
from easydel.hub.match import aligned_table
from easydel.hub.quantized import PARTS, StoredQuantization, rendered_config, stored_layers, stored_quantization
from easydel.hub.report import short
from easydel.hub.resolve import checkpoint_table, read_limited
from easydel.hub.safetensors import TensorEntry, unique_json
from easydel.hub.weight_map import links_by_form, stored_variables
from easydel.infra import placing
from easydel.infra.construct import config_class_of, construct
from easydel.infra.registry import FAMILIES, get_config_class
from easydel.paths import named_modules
from easydel.quantization.loading import LoadQuantizer, with_parts
from easydel.rngs import shape_rngs
from easydel.sharding import PartitionRules, check_mesh

CONFIG = "config.json"
GENERATION = "generation_config.json"
QUANTIZATION = "quantization_config"
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, not JSON, or holds something else.
    """
    content = unique_json(read_limited(file), str(file))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def load_config(directory: Path, config_class: Any, overrides: Mapping[str, Any]) -> Any:
    """Return the config in `directory`, with some of its fields overridden.

    Args:
        directory: holds `config.json`.
        config_class: `None` chooses by the file's `model_type`.
        overrides: fields of the config, runtime settings included.

    Raises:
        CheckpointError: no config, a broken one, or one of another `model_type`.
        UnsupportedError: nobody registered the file's `model_type`.
        TypeError: the config has no field of that name.
    """
    file = directory / CONFIG
    content = decode_floats(read_json(file))
    model_type = content.get("model_type", "")
    if config_class is None:
        if not isinstance(model_type, str) or not model_type:
            raise CheckpointError(f"{file}: has no model_type, so the model's class cannot be chosen; name the class")
        try:
            config_class = get_config_class(model_type)
        except UnsupportedError as error:
            raise UnsupportedError(f"{file}: {error}{_known_parts(content)}") from None
    expected = getattr(config_class, "model_type", "")
    if model_type and expected and model_type != expected:
        part = inner_config(content, expected, file)
        if part is None:
            raise CheckpointError(
                f"{file}: is for model_type {short(model_type)}, which is not supported by {config_class.__name__} "
                f"(for {expected!r}); use the class of that model_type, or an Auto class"
            )
        content = part
    # How a model runs here is not the file's to say; older ones hold a `gradient_checkpointing` that meant torch's.
    runtime = getattr(config_class, "runtime_fields", ())
    content = {name: value for name, value in content.items() if name not in runtime}
    check_content(content, file, overrides)
    try:
        config, unused = config_class.from_dict(content, return_unused_kwargs=True, **overrides)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{file}: {config_class.__name__} does not accept it: {error!s:.500}; correct the file or fetch it again"
        ) from error
    if unused:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(map(repr, unused))}")
    check_config(config, file)
    # How the tensors of a file are stored says nothing of the model: it may be dequantized, or quantized otherwise.
    vars(config).pop(QUANTIZATION, None)
    config.source_directory = str(directory)
    return config


def _known_parts(content: Mapping[str, Any]) -> str:
    """Return what to say of the configs in an unknown model's config that are of a known `model_type`."""
    types = {n: part.get("model_type") for n, part in content.items() if isinstance(part, Mapping)}
    known = [f"{short(name)} ({kind})" for name, kind in types.items() if isinstance(kind, str) and kind in FAMILIES]
    if not known:
        return ""
    return f". Parts of it are supported: {', '.join(known)}; the class of such a model loads its part alone"


def load_pretrained(
    cls: type,
    directory: Path,
    *,
    config: Any = None,
    overrides: Mapping[str, Any],
    dtype: Any,
    param_dtype: Any,
    precision: Any,
    rngs: nnx.Rngs | None,
    shard: bool,
    partition_rules: PartitionRules | None,
    mesh: jax.sharding.Mesh | None,
    strict: bool,
    allow_new: Sequence[str],
    progress: bool,
    quantizer: LoadQuantizer | None = None,
) -> Any:
    """Build a `cls` from the checkpoint in `directory`; see `EasyBridgeMixin.from_pretrained`."""
    own = config is None  # from here on the file answers for what the config says
    if own:
        config = load_config(directory, config_class_of(cls), overrides)
    elif overrides:
        raise TypeError(f"give either config= or its fields, got both ({', '.join(overrides)})")
    param_dtype = dtype if param_dtype is None else param_dtype
    settings = read_json(directory / GENERATION) if (directory / GENERATION).is_file() else None
    table: Mapping[str, TensorEntry] = checkpoint_table(directory)
    stored = _stored_quantization(directory, table)
    if stored is not None:
        if quantizer is not None:
            raise ValueError(f"{directory}: is quantized already ({stored.method!r}); leave quantization_method out")
        table = stored.table
    if own:
        check_depth(config, len(table), directory / CONFIG)
        if hasattr(config, "follow_tensors"):
            config.follow_tensors(table.keys(), overrides.keys())
    compute = dtype or param_dtype or checkpoint_dtype(table)
    placed_on: jax.sharding.Mesh = config.mesh if mesh is None and shard else mesh  # type: ignore[assignment]
    if shard:
        check_mesh(placed_on, devices=True)
    key = None if rngs is None else rngs()

    def build(streams: nnx.Rngs | None = None) -> Any:
        return construct(
            cls,
            config,
            dtype=compute,
            param_dtype=param_dtype or compute,
            precision=precision,
            rngs=nnx.Rngs(0 if key is None else key) if streams is None else streams,
        )

    def build_shapes() -> Any:
        try:
            return build(shape_rngs())
        except (ValueError, ArithmeticError) as error:
            if not own:
                raise
            if isinstance(error, UnsupportedError):
                raise UnsupportedError(f"{directory / CONFIG}: {error}") from error
            raise CheckpointError(f"{directory / CONFIG}: {cls.__name__} cannot be built from it: {error}") from error

    make, make_shapes = build, build_shapes
    if stored is not None:
        make, make_shapes = _quantized_makers(build, build_shapes, stored, directory)

    def shardings(module: Any) -> Mapping[str, Any]:
        rules = placing.rules_in_force(module) if partition_rules is None else partition_rules
        return placing.module_shardings(module, rules, placed_on, strict=strict)

    model = load_module(
        make,
        directory,
        param_dtype=param_dtype,
        shardings=shardings if shard else None,
        allow_new=allow_new,
        progress=progress,
        build_shapes=make_shapes,
        table=table,
        quantizer=quantizer,
    )
    if shard:
        model._mark_sharded(placed_on)
    if settings is not None:
        model.generation_settings = json.dumps(settings, sort_keys=True)
    return model


def _stored_quantization(directory: Path, table: Mapping[str, TensorEntry]) -> StoredQuantization | None:
    """Return how the tensors of a checkpoint are quantized; `None` if they are not."""
    file = directory / CONFIG
    settings = read_json(file).get(QUANTIZATION) if file.is_file() else None
    return None if settings is None else stored_quantization(settings, table, str(file))


def _quantized_makers(build: Any, build_shapes: Any, stored: StoredQuantization, directory: Path) -> Any:
    """Return the two functions with those layers quantized whose codes the checkpoint holds."""
    settings: dict[str, Any] = {"method": stored.method, "group_size": stored.group_size}
    whole = build_abstract(with_parts(build_shapes, **settings))
    variables, modules = stored_variables(whole), named_modules(whole)
    wanted = {
        name for links in links_by_form(whole, variables, modules).values() for link in links for name in link.sources
    }
    names = aligned_table(whole, stored.table, wanted, modules).table
    paths = stored_layers(whole, frozenset(names), str(directory))
    return with_parts(build, paths=paths, **settings), with_parts(build_shapes, paths=paths, **settings)


def checkpoint_dtype(table: Mapping[str, TensorEntry]) -> jnp.dtype:
    """Return the float type that holds most of a checkpoint's bytes, if one can compute in it; else float32."""
    sizes: dict[str, int] = {}
    for name, entry in table.items():
        if name.endswith(PARTS):  # scales are float32 whatever the model is
            continue
        if jnp.issubdtype(entry.dtype, jnp.floating):
            sizes[str(entry.dtype)] = sizes.get(str(entry.dtype), 0) + entry.nbytes
    common = max(sizes, key=lambda name: sizes[name], default="float32")
    return jnp.dtype(common if common in _COMPUTE_DTYPES else "float32")


def rendered_files(model: Any) -> dict[str, str]:
    """Return name → text of the JSON files that go with a model's weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    content = json.loads(config.to_json_string()) | {"dtype": str(model.module_dtype)}
    if (quantization := rendered_config(model)) is not None:
        content[QUANTIZATION] = quantization
    files = {CONFIG: json.dumps(content, indent=2, sort_keys=True) + "\n"}
    settings = model.generation_settings
    if settings is None and model.can_generate:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(config, name, None) for name in names}
        settings = json.dumps({name: value for name, value in ids.items() if value is not None})
    if settings is not None:
        files[GENERATION] = json.dumps(json.loads(settings), indent=2, sort_keys=True) + "\n"
    return files
