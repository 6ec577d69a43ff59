"""Changing the size of a model's vocabulary: checked first, computed next, put in place last."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.calls import refuse_shapes
from easydel.errors import ShardingError, UnsupportedError
from easydel.infra import placing
from easydel.infra.construct import construct
from easydel.infra.views import is_float
from easydel.infra.vocabulary import Differences, changed_configs, differences, text_config, vocabulary_size
from easydel.paths import named_modules, named_variables
from easydel.sharding import FitReport, fit_spec, match_rules

NOISE = 1e-9
"""Share of the old vectors' covariance that new ones get, as in transformers: hardly more than the mean."""


def resize(
    module: Any,
    new_num_tokens: int | None,
    pad_to_multiple_of: int | None,
    mean_resizing: bool,
    rngs: nnx.Rngs | None,
) -> None:
    """Change the vocabulary's size; see `EasyDeLBaseModule.resize_token_embeddings`."""
    old = vocabulary_size(module.config)
    size = target_size(old, new_num_tokens, pad_to_multiple_of)
    embedding = module.get_embedding()  # a model without one has no tokens to speak of: it raises
    if size == old:
        return
    check_special_tokens(module, old, size)
    refuse_shapes(module, "resizing")
    configs = changed_configs(module.config, size)
    change = differences(module, configs)
    _check_layers(module, change)
    arrays = _resized(module, configs.new, change, mean_resizing, nnx.Rngs(0) if rngs is None else rngs)
    # Nothing below can fail: the model is either as it was or resized as a whole.
    variables = named_variables(module)
    for path, array in arrays.items():
        variables[path].set_value(array)
    modules = named_modules(module)
    for (path, name), (before, after) in change.attributes.items():
        if path in modules and getattr(modules[path], name, None) == before:
            setattr(modules[path], name, after)
    if (getattr(embedding, "padding_idx", None) or 0) >= size:
        embedding.padding_idx = None
    for layer in modules.values():
        if id(held := getattr(layer, "config", None)) in configs.copies:
            setattr(layer, "config", configs.copies[id(held)])  # noqa: B010 - not every module has one


def target_size(old: int, new_num_tokens: Any, pad_to_multiple_of: Any) -> int:
    """Return the size that is asked for.

    Raises:
        ValueError: a number that is no positive integer; nothing is rounded silently.
    """
    size = old if new_num_tokens is None else _positive("new_num_tokens", new_num_tokens)
    if pad_to_multiple_of is None:
        return size
    multiple = _positive("pad_to_multiple_of", pad_to_multiple_of)
    return -(-size // multiple) * multiple


def _positive(name: str, value: Any) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number


def check_special_tokens(module: Any, old: int, size: int) -> None:
    """Check that no special token of the config or of the generation config would fall outside.

    Raises:
        ValueError: some would; they are named. Ids that are outside already are left alone.
    """
    settings = json.loads(getattr(module, "generation_settings", None) or "{}")
    sources = {"config": vars(text_config(module.config)), "generation_config": settings}
    cut = [
        f"{source}.{name}={ids}"
        for source, values in sources.items()
        for name, ids in values.items()
        if name.endswith("_token_id") and any(size <= token < old for token in _token_ids(ids))
    ]
    if cut:
        raise ValueError(
            f"a vocabulary of {size} tokens (it has {old}) would cut off special tokens: {', '.join(cut)}; keep them, "
            "or give these fields other ids (or None) first"
        )


def _token_ids(value: Any) -> Iterator[int]:
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, int):
            yield item


def _check_layers(module: Any, change: Differences) -> None:
    """Check that the layers to resize are as their class builds them.

    Raises:
        ValueError: a variable's size is not the config's.
        UnsupportedError: a layer was changed since, by adapters or quantization.
    """
    variables = named_variables(module)
    for path in change.axes:
        parent = path.rpartition("/")[0]
        held = {other for other in variables if parent and other.startswith(f"{parent}/")}
        built = {other for other in change.built if parent and other.startswith(f"{parent}/")}
        if path not in variables or held != built:
            raise UnsupportedError(
                f"resizing {parent or path} is not supported: it holds {', '.join(sorted(held)) or 'nothing'} where "
                f"{type(module).__name__} builds {path}; resize before adapters or quantization change it"
            )
        shape = tuple(variables[path].get_value().shape)
        if shape != change.before[path]:
            raise ValueError(
                f"{path} has shape {shape}, but the config (vocab_size={vocabulary_size(module.config)}) means "
                f"{change.before[path]}; set the config's vocab_size to what the model holds first"
            )


def _resized(
    module: Any, config: Any, change: Differences, mean_resizing: bool, rngs: nnx.Rngs
) -> dict[str, jax.Array]:
    """Return the new arrays by path, each where it belongs."""
    variables = {path: variable for path, variable in named_variables(module).items() if path in change.axes}
    places = _places(module, {path: v.get_value() for path, v in variables.items()}, change)
    longer = [path for path, axis in change.axes.items() if change.after[path][axis] > change.before[path][axis]]
    drawn = [p for p in longer if mean_resizing and isinstance(variables[p], nnx.Param) and is_float(variables[p])]
    made = _initialised(module, config, change, [path for path in longer if path not in drawn], rngs)
    arrays = {}
    for path, variable in variables.items():
        axis = change.axes[path]
        program = _resizer(axis, change.after[path][axis], path in drawn, places[path])
        arrays[path] = program(variable.get_value(), rngs.params() if path in drawn else made.get(path))
    return arrays


@functools.lru_cache(maxsize=32)
def _resizer(axis: int, size: int, draws: bool, place: Any) -> Any:
    """Return a compiled `(array, source of what is new) -> array`: a key, the new slices themselves, or nothing."""

    def resized(array: jax.Array, source: Any) -> jax.Array:
        old = array.shape[axis]
        if size <= old:
            return jax.lax.slice_in_dim(array, 0, size, axis=axis)
        new = drawn_like(array, axis, size - old, source) if draws else source
        return jnp.concatenate([array, new.astype(array.dtype)], axis)

    # XLA splits the work as the result will lie: no device holds more than its share.
    return jax.jit(resized, out_shardings=place)


def _initialised(
    module: Any, config: Any, change: Differences, paths: list[str], rngs: nnx.Rngs
) -> dict[str, jax.Array]:
    """Return what the model's class itself initialises beyond the present size."""
    if not paths:
        return {}
    dtypes = {"dtype": module.dtype, "param_dtype": module.param_dtype, "precision": module.precision}
    key = rngs.params()

    def tails() -> list[jax.Array]:
        # XLA drops the initialisers of everything else.
        fresh = named_variables(construct(type(module), config, **dtypes, rngs=nnx.Rngs(key)))
        axes, before = change.axes, change.before
        return [jax.lax.slice_in_dim(fresh[p].get_value(), before[p][axes[p]], None, axis=axes[p]) for p in paths]

    return dict(zip(paths, jax.jit(tails)(), strict=True))


def drawn_like(array: jax.Array, axis: int, count: int, key: jax.Array) -> jax.Array:
    """Draw new slices along an axis from the normal distribution of those that are there, with hardly any noise.

    Mean `m` and covariance `NOISE · C` of the old slices, in float32; the mean alone where `C` is not positive
    definite. So no new token stands out (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    A bias gets the mean with a deviation of `NOISE · s`. Both are transformers' choices.

    Args:
        array: float, `[…, old, …]`.
        axis: of the tokens.
        count: number of new ones.
        key: random key.

    Returns:
        `[…, count, …]`, float32.
    """
    vectors = jnp.moveaxis(array, axis, 0).astype(jnp.float32)
    rest, vectors = vectors.shape[1:], vectors.reshape(vectors.shape[0], -1)
    mean = vectors.mean(axis=0)
    noise = jax.random.normal(key, (count, vectors.shape[1]))
    if rest:
        centred = vectors - mean
        covariance = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST) / len(vectors)
        factor = jnp.linalg.cholesky(covariance)
        factor = jnp.where(jnp.isfinite(factor).all(), factor, 0.0)
        noise = NOISE**0.5 * jnp.matmul(noise, factor.T, precision=jax.lax.Precision.HIGHEST)
    else:
        noise = NOISE * jnp.std(vectors, axis=0) * noise
    return jnp.moveaxis((mean + noise).reshape(count, *rest), 0, axis)


def _places(module: Any, arrays: Mapping[str, jax.Array], change: Differences) -> dict[str, Any]:
    """Return where each resized array goes: on the mesh of the old one, else on its device."""
    report = FitReport()
    places: dict[str, Any] = {}
    for path, array in arrays.items():
        held = array.sharding
        if isinstance(held, NamedSharding) and isinstance(held.mesh, Mesh):
            spec = _spec(module, path, array, held, held.mesh)
            spec = fit_spec(spec, change.after[path], held.mesh, path=path, report=report)
            places[path] = NamedSharding(held.mesh, spec)
        else:
            places[path] = held if len(held.device_set) == 1 else None
    report.warn()
    return places


def _spec(module: Any, path: str, array: jax.Array, held: NamedSharding, mesh: Mesh) -> PartitionSpec:
    """Return the rules' spec of what lies as the rules in force have it, else the array's own.

    The rules' may name an axis that divides only the new size.
    """
    try:
        spec = match_rules(placing.rules_in_force(module), {path: array})[path]
        placed = NamedSharding(mesh, fit_spec(spec, array.shape, mesh))
    except ShardingError:  # it was placed by other rules
        return held.spec
    return spec if placed.is_equivalent_to(held, array.ndim) else held.spec
