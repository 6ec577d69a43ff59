"""A Llama as one would write it by hand in JAX: functions over a dictionary, one `jit` per phase.

It is the yardstick for what a base class may cost, so it is plain and not slow: kernels `[in, out]`, unrolled layers,
grouped attention by einsum, a static cache that is donated, a greedy loop that stays on the device, AdamW with
donation. It knows nothing of padding, options or other families.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

OPTIMIZER = optax.adamw(1e-4)
Params = dict[str, Any]
Cache = list[tuple[jax.Array, jax.Array]]


class Config(NamedTuple):
    """What the forward pass needs to know."""

    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    epsilon: float


def load(path: Path) -> tuple[Params, Config]:
    """Read a checkpoint of one file with tied embeddings."""
    from safetensors.numpy import load_file

    fields = json.loads((path / "config.json").read_text())
    heads = fields["num_attention_heads"]
    config = Config(
        heads,
        fields["num_key_value_heads"],
        fields["hidden_size"] // heads,
        fields["rope_parameters"]["rope_theta"],
        fields["rms_norm_eps"],
    )
    tensors = load_file(path / "model.safetensors")

    def kernel(name: str) -> jax.Array:
        return jax.device_put(tensors[f"{name}.weight"].T)

    def vector(name: str) -> jax.Array:
        return jax.device_put(tensors[f"{name}.weight"])

    layers = []
    for number in range(fields["num_hidden_layers"]):
        name = f"model.layers.{number}"
        layer = {p: kernel(f"{name}.self_attn.{p}_proj") for p in ("q", "k", "v", "o")}
        layer |= {p: kernel(f"{name}.mlp.{p}_proj") for p in ("gate", "up", "down")}
        layer |= {"norm1": vector(f"{name}.input_layernorm"), "norm2": vector(f"{name}.post_attention_layernorm")}
        layers.append(layer)
    params = {"embed": vector("model.embed_tokens"), "norm": vector("model.norm"), "layers": layers}
    return jax.block_until_ready(params), config


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Normalise the last axis, in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the halves of each head of `[batch, seq, heads, dim]`."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    p: Params, x: jax.Array, rope: Any, mask: jax.Array, cache: Any, index: Any, c: Config
) -> tuple[jax.Array, Any]:
    """Grouped-query attention; keys and values go through the cache if there is one."""
    batch, length, _ = x.shape
    q = rotate((x @ p["q"]).reshape(batch, length, c.heads, c.head_dim), *rope)
    k = rotate((x @ p["k"]).reshape(batch, length, c.kv_heads, c.head_dim), *rope)
    v = (x @ p["v"]).reshape(batch, length, c.kv_heads, c.head_dim)
    if cache is not None:
        k = jax.lax.dynamic_update_slice(cache[0], k, (0, index, 0, 0))
        v = jax.lax.dynamic_update_slice(cache[1], v, (0, index, 0, 0))
        cache = (k, v)
    q = q.reshape(batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32) * c.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(x.dtype)
    out = jnp.einsum("bkgst,btkd->bskgd", weights, v).reshape(batch, length, -1)
    return out @ p["o"], cache


def hidden_states(
    params: Params, ids: jax.Array, c: Config, cache: Cache | None = None, index: Any = 0
) -> tuple[jax.Array, Cache]:
    """Map ids `[batch, seq]` to the last hidden states and the updated cache."""
    x = params["embed"][ids]
    length = ids.shape[1]
    positions = index + jnp.arange(length)
    angles = positions[:, None] * c.theta ** (-jnp.arange(0, c.head_dim, 2) / c.head_dim)
    rope = (jnp.cos(angles)[:, None].astype(x.dtype), jnp.sin(angles)[:, None].astype(x.dtype))
    keys = length if cache is None else cache[0][0].shape[1]
    mask = jnp.arange(keys)[None, :] <= positions[:, None]
    new: Cache = []
    for number, p in enumerate(params["layers"]):
        old = None if cache is None else cache[number]
        out, kept = attention(p, rms_norm(x, p["norm1"], c.epsilon), rope, mask, old, index, c)
        x = x + out
        y = rms_norm(x, p["norm2"], c.epsilon)
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        new.append(kept)
    return rms_norm(x, params["norm"], c.epsilon), new


def head(params: Params, hidden: jax.Array) -> jax.Array:
    """Map hidden states `[..., hidden]` to logits by the tied embedding, without a transposed copy of it."""
    return jnp.einsum("...h,vh->...v", hidden, params["embed"])


@functools.partial(jax.jit, static_argnums=2)
def all_logits(params: Params, ids: jax.Array, c: Config) -> jax.Array:
    """Return logits `[batch, seq, vocab]`."""
    return head(params, hidden_states(params, ids, c)[0])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(layers: int, batch: int, length: int, c: Config, like: jax.Array) -> Cache:
    """Make the static cache, `[batch, time, heads, dim]` twice a layer."""
    shape = (batch, length, c.kv_heads, c.head_dim)
    return [(jnp.zeros(shape, like.dtype), jnp.zeros(shape, like.dtype)) for _ in range(layers)]


@functools.partial(jax.jit, static_argnums=3, donate_argnums=2)
def prefill(params: Params, ids: jax.Array, cache: Cache, c: Config) -> tuple[jax.Array, Cache]:
    """Run the prompt; return the first new token of each row and the cache."""
    hidden, cache = hidden_states(params, ids, c, cache)
    return head(params, hidden[:, -1]).argmax(-1).astype(jnp.int32), cache


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=2)
def decode(
    params: Params, token: jax.Array, cache: Cache, index: jax.Array, count: int, c: Config
) -> tuple[jax.Array, Cache]:
    """Make `count` more tokens, `[batch, count]`."""

    def step(number: jax.Array, carry: Any) -> Any:
        token, cache, made = carry
        hidden, cache = hidden_states(params, token[:, None], c, cache, index + number)
        token = head(params, hidden[:, -1]).argmax(-1).astype(jnp.int32)
        return token, cache, made.at[:, number].set(token)

    made = jnp.zeros((token.shape[0], count), jnp.int32)
    _, cache, made = jax.lax.fori_loop(0, count, step, (token, cache, made))
    return made, cache


def generate(params: Params, c: Config, ids: Any, count: int) -> jax.Array:
    """Continue prompts greedily; return the new tokens `[batch, count]`."""
    ids = jnp.asarray(ids)
    batch, length = ids.shape
    cache = empty_cache(len(params["layers"]), batch, length + count, c, params["embed"])
    first, cache = prefill(params, ids, cache, c)
    if count == 1:
        return first[:, None]
    more, _ = decode(params, first, cache, jnp.int32(length), count - 1, c)
    return jnp.concatenate([first[:, None], more], axis=1)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
def train_step(params: Params, state: Any, ids: jax.Array, c: Config) -> tuple[Params, Any, jax.Array]:
    """Update the parameters once by AdamW on the next-token cross-entropy."""

    def loss_of(params: Params) -> jax.Array:
        logits = head(params, hidden_states(params, ids, c)[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
        return losses.mean()

    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss
