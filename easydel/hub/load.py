"""File to shard: build a module without memory, then read each parameter straight to its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.distributed import is_first
from easydel.hub.abstract import build_abstract
from easydel.hub.fill import Filler, common_dtypes
from easydel.hub.match import Match, match_checkpoint
from easydel.hub.place import place_link
from easydel.hub.resolve import checkpoint_table
from easydel.hub.safetensors import TensorEntry
from easydel.paths import each_layer, named_variables, plain_arrays
from easydel.quantization.loading import LoadQuantizer
from easydel.sharding import create_arrays
from easydel.stacked import Held, kind_of, layer_paths

M = TypeVar("M", bound=nnx.Module)
Shardings = Callable[[Any], Mapping[str, jax.sharding.Sharding]]
LARGE = 200_000_000  # bytes from which a progress bar is shown


def load_module(
    build: Callable[[], M],
    directory: str | Path,
    *,
    param_dtype: Any = None,
    shardings: Shardings | None = None,
    allow_new: Sequence[str] = (),
    progress: bool = True,
    build_shapes: Callable[[], M] | None = None,
    table: Mapping[str, TensorEntry] | None = None,
    quantizer: LoadQuantizer | None = None,
) -> M:
    """Build a module whose parameters come from the checkpoint in `directory`.

    `build` runs abstractly, so nothing is initialised that the checkpoint holds. Everything is checked before the
    first tensor is read. No device holds more than its share plus one tensor.

    Args:
        build: makes the module, e.g. `lambda: LlamaForCausalLM(config, rngs=nnx.Rngs(0))`; its seeds initialise
            whatever is new.
        directory: as returned by `resolve_checkpoint`.
        param_dtype: storage type of floating parameters; `None` keeps the file's, tensor by tensor.
        shardings: called once with the abstract module; returns placements by path. A path it leaves out goes to the
            default device.
        allow_new: regular expressions (of our paths or of checkpoint names); matching parameters that the checkpoint
            lacks, or holds in another shape, are initialised instead.
        progress: show a bar on stderr for loads of more than 200 MB that take over 2 s.
        build_shapes: `build` with `rngs=shape_rngs()`, used for shapes only: several times as fast for deep models.
        table: `checkpoint_table(directory)`, if the caller has it already.
        quantizer: turns kernels into codes as they are read; `build` makes the float module.

    Raises:
        CheckpointError: the files are broken or do not fit the module.
    """
    directory = Path(directory)
    table = checkpoint_table(directory) if table is None else table
    module = build_abstract(build_shapes or build)
    match = match_checkpoint(module, table, directory, allow_new)
    variables = named_variables(module)
    dtypes = common_dtypes(variables, _target_dtypes(match, variables, param_dtype))
    if quantizer is not None:
        quantizer.install(module)
        variables = named_variables(module)
    stored = dict(shardings(module)) if shardings is not None else {}
    placements = each_layer(stored)
    held = named_variables(module, by_layer=False)
    filler = Filler(variables, {id(held[path]): place for path, place in stored.items() if path in held})

    def put(path: str, array: jax.Array) -> None:
        if quantizer is None or not quantizer.takes(path):
            filler.put(path, array)
            return
        for part, codes in quantizer.parts(path, array).items():
            filler.put(part, jax.device_put(codes, placements.get(part)))

    total = sum(match.table[source].nbytes for link in match.links for source in link.sources)
    with _Bar(total, progress and total > LARGE and is_first()) as bar:
        for link in match.links:
            read = place_link(link, match.table, dtypes, placements)
            while read:  # a kernel lives no longer than it takes to quantize it
                put(*read.popitem())
            bar.advance(sum(match.table[source].nbytes for source in link.sources))
    leaked = plain_arrays(module)
    if match.new or leaked:
        new = _whole_stacks(match.new, held)
        dtypes |= {path: dtypes[layers[0]] for path in new if (layers := layer_paths(path))}
        fresh, plain = _initialise(build, new, list(leaked), dtypes, placements | stored)
        for path, array in fresh.items():
            if path in held:
                held[path].set_value(array)
            else:
                put(path, array)
        for path, array in plain.items():
            node, name = leaked[path]
            setattr(node, name, nnx.data(array))
    filler.finish()
    return module


def _whole_stacks(paths: Sequence[str], held: Mapping[str, nnx.Variable]) -> list[str]:
    """Return the paths, those of stacks in place of their layers' where all layers are among them."""
    left = dict.fromkeys(paths)
    stacks = [path for path in held if (layers := layer_paths(path)) and left.keys() >= set(layers)]
    for stack in stacks:
        for path in layer_paths(stack) or []:
            del left[path]
    return [*stacks, *left]


def _target_dtypes(match: Match, variables: Mapping[str, Held], param_dtype: Any) -> dict[str, Any]:
    """Return the dtype each variable will have: parameters follow `param_dtype`, else the file; the rest its own."""
    dtypes = {path: variable.dtype for path, variable in variables.items()}
    sizes: dict[Any, int] = {}
    for link in match.links:
        entry = match.table[link.sources[0]]
        for path in link.targets:
            if issubclass(kind_of(variables[path]), nnx.Param) and jnp.issubdtype(entry.dtype, jnp.floating):
                dtypes[path] = np.dtype(param_dtype or entry.dtype)
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    common = param_dtype or max(sizes, key=lambda dtype: sizes[dtype], default=None)
    for path in match.new:
        if (
            common is not None
            and issubclass(kind_of(variables[path]), nnx.Param)
            and jnp.issubdtype(dtypes[path], jnp.floating)
        ):
            dtypes[path] = np.dtype(common)
    return dtypes


def _initialise(
    build: Callable[[], nnx.Module],
    paths: Sequence[str],
    plain: Sequence[str],
    dtypes: Mapping[str, Any],
    placements: Mapping[str, jax.sharding.Sharding],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Run `build`, keeping only the named variables and plain arrays: what else it would make is left out."""

    def only() -> list[jax.Array]:
        module = build()
        variables = named_variables(module) | named_variables(module, by_layer=False)
        outside = plain_arrays(module)
        kept = [variables[path].get_value() for path in paths]
        kept = [x if x.dtype == dtypes[path] else x.astype(dtypes[path]) for x, path in zip(kept, paths, strict=True)]
        return kept + [getattr(*outside[path]) for path in plain]

    made = create_arrays(only, [placements.get(path) for path in (*paths, *plain)])
    return dict(zip(paths, made, strict=False)), dict(zip(plain, made[len(paths) :], strict=True))


class _Bar:
    """A tqdm bar over bytes, or nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown, self._bar = total, shown, None

    def __enter__(self) -> _Bar:
        if self._shown:
            from tqdm import tqdm

            # The delay keeps loads that are over in two seconds silent.
            self._bar = tqdm(
                total=self._total, unit="B", unit_scale=True, desc="loading", file=sys.stderr, delay=2, leave=False
            )
        return self

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
