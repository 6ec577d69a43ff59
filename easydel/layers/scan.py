"""Layers whose parameters are stored stacked, run by a scan: a block is compiled once, however many there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel import native
from easydel.caching import StackedCaches, caching_layers
from easydel.caching.stacked import repeated
from easydel.layers.periods import ranges_of
from easydel.layers.stack import LayerInputs, LayerOutput, LayerStack, StackOutput, remat_policy
from easydel.paths import named_variables
from easydel.rngs import are_for_shapes
from easydel.sharding import activation_mesh, constrain, current_mesh, is_gathering
from easydel.stacked import layer_of, range_name, range_of


def make_layers(
    make: Callable[[Any], nnx.Module], kinds: Sequence[Any], rngs: nnx.Rngs, *, scan: bool
) -> LayerStack | ScannedLayers:
    """Make a model's layers, one block per kind, from the same keys in either form.

    Args:
        make: kind → block.
        kinds: of each layer; blocks of equal kinds differ in their numbers only.
        rngs: the keys that `make` uses.
        scan: whether to store them stacked (`config.scan_layers`).
    """
    form: Any = ScannedLayers if scan else LayerStack
    return form.build(make, kinds, rngs)


class ScannedLayers(nnx.Module):
    """Blocks as in `LayerStack`, equal ones as one block whose variables have a leading axis.

    They stand under the ranges of the layers they hold, `0:8:2` and `1:8:2` where every other layer is of another kind
    (`easydel.stacked`). What repeats no pattern is a stack of one.
    """

    @classmethod
    def build(cls, make: Callable[[Any], nnx.Module], kinds: Sequence[Any], rngs: nnx.Rngs) -> ScannedLayers:
        """Make the blocks; see `make_layers`.

        Raises:
            ValueError: blocks of one kind are built differently.
        """
        if are_for_shapes(rngs):  # blocks of a kind are equal in every bit
            first = {kind: nnx.split(make(kind)) for kind in dict.fromkeys(kinds)}
            blocks = [first[kind] for kind in kinds]
        else:
            blocks = [nnx.split(make(kind)) for kind in kinds]
        layers = cls()
        for places in ranges_of(kinds):
            setattr(layers, range_name(places), _stacked([blocks[place] for place in places], places))
        return layers

    def stacks(self) -> dict[str, Any]:
        """Return the stacked blocks by the names of their ranges, in order."""
        named = {name: block for name, block in vars(self).items() if range_of(name)}
        return dict(sorted(named.items(), key=lambda item: int(item[0].split(":")[0])))

    def __len__(self) -> int:
        return sum(len(range_of(name)) for name in self.stacks())

    def __getitem__(self, layer: int) -> Any:
        """Return a layer as a block of its own, a copy."""
        for name, block in self.stacks().items():
            if layer in range_of(name):
                graphdef, state = nnx.split(block)
                part = functools.partial(layer_of, index=range_of(name).index(layer))
                return nnx.merge(graphdef, jax.tree.map(part, state))
        raise IndexError(f"layer {layer} of {len(self)}")

    def __iter__(self) -> Iterator[Any]:
        return (self[layer] for layer in range(len(self)))

    def init_cache(self, batch_size: int, max_length: int, dtype: Any) -> StackedCaches | None:
        """Make the layers' empty caches; `None` if they keep nothing."""
        made = {}
        for name, block in self.stacks().items():
            for layer in caching_layers(block):  # one, or none
                count, arguments = len(range_of(name)), (batch_size, max_length, dtype)
                if (cache := repeated(functools.partial(layer.init_cache, *arguments), count)) is not None:
                    made[name] = cache
        return StackedCaches(made) if made else None

    def run(self, hidden: jax.Array, inputs: LayerInputs, caches: Any, remat: str = "none") -> StackOutput:
        """Run all blocks; see `LayerStack.run`.

        Args:
            hidden: `[batch, seq, hidden]`.
            inputs: shared by all blocks.
            caches: from `init_cache`, or `None`.
            remat: what a block keeps for its backward pass (`config.gradient_checkpointing`).
        """
        if caches is not None and not isinstance(caches, StackedCaches):
            raise TypeError(f"scan_layers=True needs a cache from init_operations_cache, got {type(caches).__name__}")
        first = hidden = constrain(hidden, "batch", "sequence", None)
        stacks, names = self.stacks(), list(self.stacks())
        kept: dict[str, Any] = {}
        outputs: list[tuple[Any, LayerOutput]] = [(None, LayerOutput(hidden))] * len(self)
        while names:
            run = [name for name in names if name.split(":")[1] == names[0].split(":")[1]]
            names = names[len(run) :]
            given = None if caches is None else tuple(caches.stacks.get(name) for name in run)
            hidden, new, outs = _run_blocks([stacks[name] for name in run], hidden, inputs, given, remat)
            kept |= {name: cache for name, cache in zip(run, new or (), strict=False) if cache is not None}
            for name, out in zip(run, outs, strict=True):
                for place, layer in enumerate(range_of(name)):
                    outputs[layer] = jax.tree.map(lambda x, place=place: layer_of(x, place), out)
        states = tuple(state for state, _ in outputs if state is not None)
        layers = tuple(out for _, out in outputs)
        return StackOutput(hidden, (first, *states[1:]) if states else (), layers, StackedCaches(kept) if kept else ())


def _stacked(blocks: list[tuple[Any, Any]], places: range) -> nnx.Module:
    """Return blocks as one, given as graphdefs and states."""
    graphdef, state = blocks[0]
    for place, (other, _) in zip(places, blocks, strict=True):
        if other != graphdef:
            raise ValueError(
                f"layers {places[0]} and {place} are of one kind but built differently, so that they cannot be stored "
                "together: tell them apart by their kinds, or use scan_layers=False"
            )
    columns = [jax.tree.leaves(state) for _, state in blocks]
    stacks = [_stack(leaves) for leaves in zip(*columns, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), stacks))


def _stack(leaves: Sequence[jax.Array]) -> jax.Array:
    first = leaves[0]
    if all(leaf is first for leaf in leaves):  # for shapes alone: one operation, however many layers
        return jnp.broadcast_to(first, (len(leaves), *first.shape))
    return jnp.stack(leaves)


@dataclass(frozen=True)
class _Program:
    """What of a run is static: the blocks' definitions, how often they are repeated, and how they are run."""

    graphdefs: tuple[Any, ...]
    repeats: int
    remat: str
    mesh: Any


def _run_blocks(
    blocks: list[Any], hidden: jax.Array, inputs: LayerInputs, caches: tuple[Any, ...] | None, remat: str
) -> tuple[jax.Array, Any, Any]:
    """Run the stacked blocks of one run of layers; return the hidden states, the caches, and what layers gave back.

    The last is, for each block, what each layer was given and its `LayerOutput`, `[layers, …]`.
    """
    parts: list[Any] = [nnx.split(block, nnx.Param, ...) for block in blocks]
    graphdefs, states = tuple(part[0] for part in parts), tuple(part[1:] for part in parts)
    repeats = jax.tree.leaves(states)[0].shape[0]
    program = _Program(graphdefs, repeats, remat, current_mesh())
    # Outside of jit each call of a scan would be compiled anew.
    run = _scanned if isinstance(hidden, jax.core.Tracer) else _compiled
    hidden, caches, outs, changed = run(program, states, hidden, inputs, caches)
    for block, new in zip(blocks, changed, strict=True):
        variables = named_variables(block)
        for path, value in new.items():
            variables[path].set_value(value)
    return hidden, caches, outs


def _scanned(
    program: _Program, states: tuple[Any, ...], hidden: jax.Array, inputs: LayerInputs, caches: tuple[Any, ...] | None
) -> tuple[jax.Array, Any, Any, Any]:
    # What is in the carry is updated in place. An empty cache is only written, and may get its arrays only now.
    carried = caches if inputs.mask.offset is not None else None
    given = None if carried is not None else caches

    def step(carry: tuple[jax.Array, Any], part: tuple[Any, Any, Any]) -> tuple[tuple[jax.Array, Any], Any]:
        hidden, carried = carry
        index, layer, given = part
        layer = _at(states, index) if layer is None else layer
        outs, changed, kept = [], [], []
        for place, graphdef in enumerate(program.graphdefs):
            cache = _entry(given, place) if carried is None else _at(carried[place], index)
            before = hidden if inputs.output_hidden_states else None
            with native.kernels_are_sliced(_slices(layer[place], states[place], index) if carried is not None else ()):
                out, new = _block(graphdef, program.remat, learns=carried is None)(layer[place], hidden, inputs, cache)
            hidden = constrain(out.hidden, "batch", "sequence", None)
            kept.append(out.cache if carried is None else _put(carried[place], out.cache, index))
            outs.append((before, out.replace(hidden=None, cache=None)))
            changed.append(new)
        if carried is not None:
            return (hidden, tuple(kept)), (None, tuple(outs), tuple(changed))
        return (hidden, None), (tuple(kept), tuple(outs), tuple(changed))

    # Tokens that follow others: kernels are read from the stacks themselves.
    parts = (jnp.arange(program.repeats, dtype=jnp.int32), states if carried is None else None, given)
    with activation_mesh(program.mesh):
        if program.repeats == 1:
            carry, made = step((hidden, carried), _at(parts, 0, static=True))
            made = jax.tree.map(lambda x: x[None], made)
        else:
            carry, made = jax.lax.scan(step, (_as_carried(step, hidden, carried, parts), carried), parts)
    hidden, carried = carry
    kept, outs, changed = made
    return hidden, carried if carried is not None else kept, outs, changed


_compiled = functools.partial(jax.jit, static_argnums=0)(_scanned)


def _slices(layer: Any, stacks: Any, index: jax.Array) -> Iterator[native.Slice]:
    """Yield the matrices of a layer, those of experts together, with the stacks they come from."""
    for array, stack in zip(jax.tree.leaves(layer), jax.tree.leaves(stacks), strict=True):
        if stack.ndim >= 3:
            yield native.Slice(array, stack, index)


def _block(graphdef: Any, remat: str, *, learns: bool) -> Callable[..., tuple[LayerOutput, dict[str, Any]]]:
    """Return a pure `(states, hidden, inputs, cache) -> (output, what else changed by path)` of one layer.

    What is kept for a backward pass is chosen where there may be one (`learns`).
    """

    def call(states: Any, hidden: jax.Array, inputs: LayerInputs, cache: Any) -> tuple[LayerOutput, dict[str, Any]]:
        block = nnx.merge(graphdef, *states, copy=True)
        others = {path: v for path, v in named_variables(block).items() if not isinstance(v, nnx.Param)}
        before = {path: variable.get_value() for path, variable in others.items()}
        out = block(hidden, inputs, cache)
        new = {path: variable.get_value() for path, variable in others.items()}
        return out, {path: value for path, value in new.items() if value is not before[path]}

    if not learns:
        return call
    policy = _all_but_elementwise if remat == "none" else remat_policy(remat)
    # In a scan nothing can be merged with what is computed again.
    return jax.checkpoint(call, policy=policy, prevent_cse=False)


_ELEMENTWISE = frozenset(
    ("abs", "add", "and", "cos", "div", "eq", "erf", "exp", "exp2", "ge", "gt", "integer_pow", "le", "log", "log1p",
     "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt", "select_n", "sign", "sin", "sqrt",
     "square", "sub", "tanh",
     "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "expand_dims", "iota", "pad", "reshape",
     "slice", "squeeze", "stop_gradient", "transpose")
)  # fmt: skip


def _all_but_elementwise(primitive: Any, *_: Any, **params: Any) -> bool:
    """Say whether a result is kept for the backward pass of a scan: all but what costs a pass over it at most.

    XLA makes this choice itself where layers stand one by one. From a loop it takes whatever it is told to, each array
    as often as it is used: a step took a fifth longer, and two thirds more memory for what is kept. Weights gathered
    over `fsdp` are gathered once more.
    """
    return primitive.name not in _ELEMENTWISE and not is_gathering(primitive, params)


def _as_carried(step: Any, hidden: jax.Array, carried: Any, parts: Any) -> jax.Array:
    """Return the hidden states in the type that layers return them in: a residual may be kept in float32."""
    if hidden.dtype == jnp.float32:
        return hidden
    first = jax.eval_shape(lambda: _at(parts, 0))
    (out, _), _ = jax.eval_shape(step, (hidden, carried), first)
    return hidden.astype(out.dtype)


def _entry(caches: Any, place: int) -> Any:
    return None if caches is None else caches[place]


def _at(tree: Any, index: Any, *, static: bool = False) -> Any:
    if static:
        return jax.tree.map(lambda x: x[index], tree)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, new: Any, index: Any) -> Any:
    return jax.tree.map(lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x, index, 0), tree, new)
