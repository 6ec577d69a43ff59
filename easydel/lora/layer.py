"""A layer with an adapter: the layer itself, its class exchanged for one that adds `scale · B A x`."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from easydel.layers.linear import flat_inputs
from easydel.layers.moe.mechanisms import grouped_product
from easydel.lora.weights import adapter_spec, is_experts, scaled_product, weight_matrix
from easydel.paths import drop_attribute
from easydel.sharding import at_use, sequence_is_split

PARAMETERS = ("a", "b", "magnitude")
"""What of an adapter is learned."""


class LoraScale(nnx.Variable):
    """What an adapter's product is multiplied by: data, so that adapters of other alphas share a program."""


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter of one layer is like: those that are alike share compiled programs.

    Attributes:
        rank: of it.
        dropout: rate, of its input in training.
        dora: whether it learns magnitudes.
        shares: stored path of the first of the layers that have one `A` together; `None`: it has its own.
    """

    rank: int
    dropout: float = 0.0
    dora: bool = False
    shares: str | None = None


class LoraAdapter(nnx.Module):
    """The adapter of a layer; of a stack of layers every variable has a leading axis of layers.

    Args:
        arrays: of `a`, `b`, `scale` and, with DoRA, `magnitude`.
        dropout: of the input.

    Attributes:
        a: float32 `[in, rank]`, of experts `[experts, in, rank]`, of embeddings `[vocab, rank]`.
        b: float32 `[rank, out]`, of experts `[experts, rank, out]`, of embeddings `[rank, features]`.
        scale: float32 `[]`.
        magnitude: float32 `[out]`, or `None`.
        dropout: of the input.
        enabled: whether it is added.
        merged: whether the layer's weight holds it already, so that it is not added.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], dropout: nnx.Dropout) -> None:
        def parameter(name: str) -> Any:
            return nnx.LoRAParam(arrays[name], persistent=False) if name in arrays else None

        # Files of the model do not hold adapters.
        self.a, self.b, self.magnitude = (nnx.data(parameter(name)) for name in PARAMETERS)
        self.scale = LoraScale(arrays["scale"], persistent=False)
        self.dropout = dropout
        self.enabled, self.merged = True, False

    @property
    def is_used(self) -> bool:
        """Whether the layer adds it."""
        return self.enabled and not self.merged

    @property
    def spec(self) -> AdapterSpec:
        """What it is like."""
        rank = self.a.get_value().shape[-1]
        return AdapterSpec(rank, float(self.dropout.rate), self.magnitude is not None)

    def variables(self) -> dict[str, nnx.Variable]:
        """Return what it holds besides random keys, by name."""
        return {name: held for name in (*PARAMETERS, "scale") if (held := getattr(self, name)) is not None}


class AdaptedMeta(type(nnx.Module)):  # type: ignore[misc]
    """The class of the classes of adapted layers: these are made while a program runs, so pickles name their base.

    Attributes:
        plain_class: the layer's class without an adapter; its one base, else an object could not change its class.
    """

    plain_class: Any


def is_adapted(layer: Any) -> bool:
    """Whether a layer carries an adapter, as `layer.lora`."""
    return isinstance(type(layer), AdaptedMeta)


def plain_class(layer: Any) -> Any:
    """Return a layer's class, of an adapted one that which it had."""
    return type(layer).plain_class if is_adapted(layer) else type(layer)


def _linear_call(self: Any, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Map `[..., in]` to `[..., out]`."""
    base = plain_class(self).__call__
    y = base(self, inputs, *args, **options)
    lora = self.lora
    if not lora.is_used:
        return y
    dropped = lora.dropout(inputs)
    added = _low_rank(self, dropped, y.dtype).reshape(y.shape)
    if lora.magnitude is None:
        return y + added
    # As PEFT has it: the base's product is taken anew only if the input is another one.
    plain = y if dropped is inputs else base(self, dropped, *args, **options)
    bias = getattr(self, "bias", None)
    plain = plain if bias is None else plain - bias.get_value().astype(plain.dtype)
    ratio = magnitude_ratio(self).astype(y.dtype).reshape(y.shape[y.ndim - _output_axes(self) :])
    return y + (ratio - 1) * plain + ratio * added


def _experts_product(self: Any, rows: jax.Array, sizes: jax.Array, *, mechanism: str, precision: Any) -> jax.Array:
    """Multiply each row by its expert's weights and add its adapter's product; see `ExpertLinear.product`."""
    options: dict[str, Any] = {"mechanism": mechanism, "precision": precision}
    y = plain_class(self).product(self, rows, sizes, **options)
    lora = self.lora
    if not lora.is_used:
        return y
    a, b, scale = (variable.get_value().astype(rows.dtype) for variable in (lora.a, lora.b, lora.scale))
    low = grouped_product(rows, sizes, a, **options) * scale
    return y + grouped_product(low, sizes, b, **options)


def _experts_spec(self: Any, name: str, kernel_spec: PartitionSpec) -> PartitionSpec:
    """Return how one of its arrays is split; see `ExpertLinear.spec_of`."""
    room, _, array = name.rpartition("/")
    return adapter_spec(self, array, kernel_spec) if room else plain_class(self).spec_of(self, name, kernel_spec)


def _embed_call(self: Any, inputs: jax.Array, *args: Any, **options: Any) -> jax.Array:
    """Map token ids `[...]` to vectors `[..., features]`."""
    vectors = plain_class(self).__call__(self, inputs, *args, **options)
    lora = self.lora
    if not lora.is_used:
        return vectors
    a, b = (variable.get_value().astype(vectors.dtype) for variable in (lora.a, lora.b))
    a = at_use(a, inputs, getattr(self, "rows", None), None)
    low = jnp.take(a, inputs, axis=0, mode="clip")  # an id outside the vocabulary is NaN already
    padding = getattr(self, "padding_idx", None)
    if padding is not None:
        low = jnp.where((inputs == padding)[..., None], jax.lax.stop_gradient(low), low)
    return vectors + jnp.matmul(low * lora.scale.get_value().astype(low.dtype), b)


@functools.cache
def adapted_class(layer_class: Any) -> AdaptedMeta:
    """Return the class of adapted layers of a class; always the same one, as compiled programs depend on it."""
    if is_experts(layer_class):
        changed: dict[str, Any] = {"product": _experts_product, "spec_of": _experts_spec}
    else:
        changed = {"__call__": _embed_call if issubclass(layer_class, nnx.Embed) else _linear_call}
    name = f"Lora{layer_class.__name__}"
    about = {"__doc__": f"`{layer_class.__name__}` with a LoRA adapter.", "__module__": __name__}
    return AdaptedMeta(name, (layer_class,), changed | about | {"plain_class": layer_class})


def _pickled(made: AdaptedMeta) -> tuple[Any, tuple[Any]]:
    return adapted_class, (made.plain_class,)


copyreg.pickle(AdaptedMeta, _pickled)


def attach(layer: Any, adapter: LoraAdapter) -> None:
    """Give a layer an adapter, in place."""
    plain: Any = type(layer)
    object.__setattr__(layer, "__class__", adapted_class(plain))
    layer.lora = adapter


def detach(layer: Any) -> None:
    """Take the adapter of a layer away, in place: it is what it was before `attach`."""
    drop_attribute(layer, "lora")
    object.__setattr__(layer, "__class__", layer.plain_class)


def _low_rank(layer: Any, inputs: jax.Array, dtype: Any) -> jax.Array:
    """Return `scale · x A B`, `[..., out]` with inputs and outputs each on one axis."""
    lora = layer.lora
    a, b = (variable.get_value().astype(dtype) for variable in (lora.a, lora.b))
    roles = getattr(layer, "roles", None)
    if roles is not None:
        a, b = at_use(a, inputs, roles[0], None), at_use(b, inputs, None, roles[1])
    x = flat_inputs(inputs.astype(dtype), getattr(layer, "axis", (-1,)))
    if x.ndim > 2 and not sequence_is_split():
        x = x.reshape(-1, x.shape[-1])  # one plain product, as in the layer itself
    low = jnp.matmul(x, a, precision=layer.precision) * lora.scale.get_value().astype(dtype)
    return jnp.matmul(low, b, precision=layer.precision)


def _output_axes(layer: Any) -> int:
    return len(layer.out_features) if isinstance(layer.out_features, tuple) else 1


def magnitude_ratio(layer: Any) -> jax.Array:
    """Return `m / ‖W + scale · A B‖` of a DoRA layer, float32 `[..., out]`; the norm is a constant to gradients.

    Section 4.3 of arXiv:2402.09353: without that constant a step takes much more memory and learns no better.
    """
    lora = layer.lora
    weight = weight_matrix(layer) + scaled_product(lora)
    return lora.magnitude.get_value() / jax.lax.stop_gradient(column_norm(weight))


def column_norm(weight: jax.Array) -> jax.Array:
    """Return the norm of each output's weights of `[..., in, out]`."""
    return jnp.sqrt(jnp.sum(weight**2, axis=-2))
