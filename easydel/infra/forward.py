"""Around a forward pass: its loss, its static arguments, its inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.calls import forward_parameters, logits_of, refuse_shapes, takes_anything
from easydel.distributed import whole
from easydel.loss import task_loss
from easydel.outputs import CausalLMOutput, ModelOutput
from easydel.paths import nearest
from easydel.sharding import activation_mesh

STATIC_NAMES = ("loss_config", "output_hidden_states", "output_attentions", "output_router_logits")
_STATIC_TYPES = (bool, str, type(None))


def front_door(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a class's `__call__`: activations follow the model's mesh, and `labels` give a loss whatever the class.

    A class that computes its own loss keeps it. One that returns bare logits gets them wrapped in an output object
    when labels are given.
    """
    parameters = inspect.signature(call).parameters
    names = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][1:]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        labels, loss_config = given.get("labels"), given.get("loss_config")
        for name in ("labels", "loss_config"):
            if name in kwargs and name not in parameters and (not takes_any or kwargs[name] is None):
                del kwargs[name]
        with activation_mesh(self.mesh if self.is_sharded else None):
            try:
                outputs = call(self, *args, **kwargs)
            except (TypeError, AttributeError, ValueError) as error:
                refuse_shapes(self, "a forward pass", error)
                raise
        if labels is None or getattr(outputs, "loss", None) is not None:
            return outputs
        return _with_loss(self, outputs, labels, loss_config)

    return wrapped


def loss_of(model: Any, outputs: Any, labels: Any, loss_config: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of a forward pass's outputs and its metrics, with the mesh that `sharding.constrain` uses."""
    logits = getattr(outputs, "uncomputed_logits", None)
    experts = (getattr(outputs, name, None) for name in ("auxiliary_loss", "router_z_loss"))
    with activation_mesh(model.mesh if model.is_sharded else None):
        logits = logits_of(outputs) if logits is None else logits
        return task_loss(model.model_task, logits, labels, loss_config, model.config, *experts)


def _with_loss(model: Any, outputs: Any, labels: Any, loss_config: Any) -> Any:
    loss, _ = loss_of(model, outputs, labels, loss_config)
    if isinstance(outputs, ModelOutput):
        used = {"uncomputed_logits": None} if getattr(outputs, "uncomputed_logits", None) is not None else {}
        return outputs.replace(loss=loss, **used)
    if isinstance(outputs, jax.Array):
        return CausalLMOutput(logits=outputs, loss=loss)
    try:
        outputs.loss = loss
    except AttributeError as error:
        raise TypeError(
            f"labels were given, but the output {type(outputs).__name__} takes no .loss: return logits, one of "
            "easydel.outputs, or compute the loss in __call__"
        ) from error
    return outputs


def static_arguments(model: Any) -> tuple[str, ...]:
    """Return the names of the arguments that must be static under `jax.jit`: flags and settings, not arrays."""
    return tuple(
        name
        for name, parameter in forward_parameters(model).items()
        if name in STATIC_NAMES
        or isinstance(parameter.default, bool | str)
        or parameter.annotation in (bool, str, "bool")
    )


def prepare_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arguments of a forward pass.

    Sequences and numpy arrays become `jax.Array` (integers int32), static arguments are checked, `None` is dropped.

    Raises:
        TypeError: a name that the forward pass does not take, or an array given for a static argument.
        ValueError: token ids outside the vocabulary, or shapes that do not fit each other.
    """
    parameters = forward_parameters(model)
    accepted = {*parameters, "labels", "loss_config"}
    any_name = takes_anything(model)
    prepared: dict[str, Any] = {}
    for name, value in inputs.items():
        if name not in accepted and not any_name:
            near = nearest(name, accepted)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TypeError(f"{type(model).__name__} takes no {name!r}{hint}; it takes {', '.join(sorted(accepted))}")
        if value is None:
            continue
        if name in static_arguments(model) or name in STATIC_NAMES:
            if isinstance(value, jax.Array | np.ndarray):
                raise TypeError(f"{name!r} is a static argument: give a Python value, not an array")
            hash(value)
            prepared[name] = value
        else:
            prepared[name] = _as_arrays(value)
    _check_tokens(model, prepared)
    _check_positions(model, prepared)
    return prepared


def _as_arrays(value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray | np.generic):
        array = np.asarray(value)
        # device_put compiles nothing, jnp.asarray a program for each new shape.
        return jax.device_put(array.astype(np.int32) if array.dtype.kind in "iu" else array)
    return value


def _check_tokens(model: Any, inputs: Mapping[str, Any]) -> None:
    for side in ("", "decoder_"):
        ids, mask = inputs.get(f"{side}input_ids"), inputs.get(f"{side}attention_mask")
        if ids is None or isinstance(ids, jax.core.Tracer):
            continue
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{side}input_ids must be integers [batch, seq], got {ids.dtype}{list(ids.shape)}")
        check_token_range(ids, getattr(model.config, "vocab_size", None))
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]):
            raise ValueError(f"{side}attention_mask {list(mask.shape)} does not fit {side}input_ids {list(ids.shape)}")


def check_length(model: Any, length: int) -> None:
    """Raise if `length` tokens in a row are more than the model has positions for."""
    longest = getattr(model, "longest_sequence", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"{type(model).__name__} has {longest} positions; {length} tokens do not fit: shorten the sequence"
        )


def _check_positions(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raise if a row has more tokens than there are positions: those beyond would be looked up as NaN."""
    mask = inputs.get("attention_mask")
    if mask is None or isinstance(mask, jax.core.Tracer) or {"position_ids", "segment_ids", "cache"} & inputs.keys():
        return  # without a mask the forward pass itself checks
    if np.ndim(mask) != 2:
        return  # the forward pass refuses it
    check_length(model, int(np.count_nonzero(whole(mask), axis=1).max(initial=0)))


def check_token_range(ids: Any, vocab_size: int | None) -> None:
    """Raise `ValueError` if a token id lies outside the vocabulary (looked up, it would give NaN)."""
    host = whole(ids)
    if vocab_size is not None and host.size and (host.min() < 0 or host.max() >= vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got [{host.min()}, {host.max()}]")
