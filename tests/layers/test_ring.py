"""Ring attention against attention on one device, which `test_attention.py` compares with loops in float64."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import easydel
from easydel.layers.attention import AttentionMask, attend, ring_turns
from easydel.layers.attention.bias import BucketBias
from easydel.sharding import activation_mesh, create_mesh

TOLERANCE = 1e-5  # float32: sums of a few dozen products, in another order
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 32, 4, 2, 8
RNG = np.random.default_rng(0)
SHAPES = [(BATCH, LENGTH, HEADS, DIM), *[(BATCH, LENGTH, KV_HEADS, DIM)] * 2, (8, HEADS)]
QUERY, KEY, VALUE, TABLE = (RNG.normal(size=shape).astype(np.float32) for shape in SHAPES)
WEIGHTS = RNG.normal(size=SHAPES[0]).astype(np.float32)
SINKS = RNG.normal(size=SHAPES[0][2]).astype(np.float32)
VALID = np.ones((BATCH, LENGTH), bool)
VALID[0, -9:] = VALID[1, :6] = False
SEGMENTS = np.stack([np.arange(LENGTH) // 7, np.arange(LENGTH) // 13]).astype(np.int32)

PLAIN = AttentionMask()
PACKED = AttentionMask(query_segments=SEGMENTS, key_segments=SEGMENTS)
CASES: dict[str, tuple[AttentionMask, dict[str, Any]]] = {
    "causal": (PLAIN, {}),
    "encoder": (AttentionMask(key_valid=VALID, causal=False), {}),
    "window": (PLAIN.with_window(6), {}),
    "window, both directions": (AttentionMask(causal=False, window=6), {}),
    "soft-cap": (PLAIN, {"softcap": 2.0}),
    "padding": (replace(PLAIN, key_valid=VALID), {}),
    "segments": (PACKED, {}),
    "bias": (AttentionMask(causal=False), {"bias": True}),
    "sinks": (PLAIN, {"sinks": True}),
    "all": (replace(PACKED, key_valid=VALID, window=11), {"softcap": 2.0, "bias": True, "sinks": True}),
}
MESHES = {
    "sp=2": (1, 1, 1, 1, 2),
    "sp=4": (1, 1, 1, 1, 4),
    "sp=8": (1, 1, 1, 1, 8),
    "dp=2, tp=2, sp=2": (2, 1, 1, 2, 2),
    "fsdp=2, sp=4": (1, 2, 1, 1, 4),
    "tp=4, sp=2": (1, 1, 1, 4, 2),  # more than there are heads of keys
}
# "all" has what the others have one by one, except that it is causal.
PAIRS: list[Any] = [("encoder", "sp=4"), ("window, both directions", "sp=4"), ("all", "sp=4"), ("causal", "sp=8")]
PAIRS += [("bias", "dp=2, tp=2, sp=2"), ("all", "tp=4, sp=2")]
OTHERS = [(case, "sp=4") for case in CASES if (case, "sp=4") not in PAIRS] + [("all", "fsdp=2, sp=4")]
OTHERS += [(case, mesh) for mesh in ("sp=2", "sp=8") for case in ("encoder", "all")]
PAIRS += [pytest.param(*names, marks=pytest.mark.slow) for names in OTHERS]


def mesh_of(name: str) -> jax.sharding.Mesh:
    return create_mesh(MESHES[name], devices=jax.devices()[: math.prod(MESHES[name])])


def both(case: str, mesh: Any, mechanism: str, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    """Return the results where a query sees anything, and the gradients of their weighted sum."""
    mask, options = CASES[case]
    rows = 1.0 if mask.key_valid is None else VALID[:, :, None, None]

    def loss(parts: Any) -> tuple[jax.Array, jax.Array]:
        *states, table, sinks = parts
        bias = BucketBias(table, 16, bidirectional=not mask.causal) if options.get("bias") else None
        extras = {"bias": bias, "sinks": sinks if options.get("sinks") else None}
        with activation_mesh(mesh):
            out, _ = attend(*states, mask, mechanism=mechanism, scale=0.3, **{**options, **extras})
        assert out.dtype == dtype
        out = out.astype(jnp.float32) * rows
        return (out * WEIGHTS).sum(), out

    parts = [jnp.asarray(x, dtype) for x in (QUERY, KEY, VALUE)] + [jnp.asarray(TABLE), jnp.asarray(SINKS)]
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parts)
    found = dict(zip(("query", "key", "value", "table", "sinks"), gradients, strict=True)) | {"out": out}
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


@functools.cache
def alone(case: str) -> dict[str, np.ndarray]:
    return both(case, None, "vanilla")


def check(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    for name, expected in want.items():
        np.testing.assert_allclose(got[name], expected, atol=tolerance, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(("case", "mesh"), PAIRS)
def test_equals_attention_on_one_device(case: str, mesh: str) -> None:
    check(both(case, mesh_of(mesh), "ring"), alone(case), TOLERANCE)


def test_long_sequences_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_turns, "BLOCK", 6)  # 16 queries on a device: blocks of 4
    # Programs are known by the mesh as well: this one is no other test's.
    mesh = create_mesh((1, 1, 1, 1, 2), devices=jax.devices()[6:])
    check(both("all", mesh, "ring"), alone("all"), TOLERANCE)


def test_half_precision() -> None:
    # Inputs, weights and results are each rounded to 8 bits: of numbers up to 4, a hundredth each.
    check(both("all", mesh_of("sp=4"), "ring", jnp.bfloat16), alone("all"), 0.06)


def test_what_sees_nothing_gets_the_mean_of_all_values() -> None:
    """As in the other mechanisms, whose softmax of equal numbers it is; gradients included."""
    mask = AttentionMask(key_valid=np.zeros((BATCH, LENGTH), bool), causal=False)

    def run(mechanism: str, mesh: Any) -> Any:
        def loss(value: Any) -> jax.Array:
            with activation_mesh(mesh):
                out = attend(jnp.asarray(QUERY), jnp.asarray(KEY), value, mask, mechanism=mechanism, scale=1.0)[0]
            return (out * WEIGHTS).sum()

        return jax.jit(jax.value_and_grad(loss))(jnp.asarray(VALUE))

    for got, want in zip(run("ring", mesh_of("sp=4")), run("vanilla", None), strict=True):
        np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def permutes(mask: AttentionMask, mechanism: str, length: int = LENGTH, **options: Any) -> int:
    """Return how often each device of four gives something to another."""

    def run(query: Any, key: Any, value: Any) -> Any:
        with activation_mesh(mesh_of("sp=4")):
            return attend(query, key, value, mask, mechanism=mechanism, scale=1.0, **options)[0]

    def counted(jaxpr: Any) -> int:
        times = ((eqn.params.get("length", 1), eqn) for eqn in jaxpr.eqns)
        inner = (n * sum(map(counted, jaxprs_in_params(eqn.params))) for n, eqn in times)
        return sum(inner) + sum(eqn.primitive.name == "ppermute" for eqn in jaxpr.eqns)

    shapes = [(BATCH, length, HEADS, DIM), *[(BATCH, length, KV_HEADS, DIM)] * 2]
    return counted(jax.make_jaxpr(run)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


@pytest.mark.parametrize(
    ("window", "passes"),
    [(1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3), (LENGTH, 3), (None, 3)],
)
def test_a_window_takes_only_the_turns_it_needs(window: int | None, passes: int) -> None:
    """Eight tokens on each of four devices: a device's first query sees `window - 1` slots of the devices before."""
    assert permutes(PLAIN.with_window(window), "ring") == 2 * passes  # keys and values


OBSTACLES: dict[str, tuple[AttentionMask, int, dict[str, Any], str]] = {
    "cache": (replace(PLAIN, offset=np.int32(0)), LENGTH, {}, "keys are those of a cache"),
    "length": (PLAIN, 30, {}, "sp=4 does not divide the 30 queries"),
    "dropout": (PLAIN, LENGTH, {"dropout": lambda x: x}, "dropout on attention weights"),
    "weights": (PLAIN, LENGTH, {"return_weights": True}, "attention weights are asked for"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_where_it_cannot_run(name: str) -> None:
    mask, length, options, reason = OBSTACLES[name]
    assert permutes(mask, "auto", length, **options) == 0 < permutes(PLAIN, "auto")
    with pytest.raises(easydel.UnsupportedError, match=f"attn_mechanism='ring' cannot run here: .*{reason}.* 'auto'"):
        permutes(mask, "ring", length, **options)


def test_it_needs_a_mesh_that_splits_sequences() -> None:
    with pytest.raises(easydel.UnsupportedError, match="no mesh splits the sequence here"):
        attend(QUERY, KEY, VALUE, PLAIN, mechanism="ring", scale=1.0)


def test_second_derivatives_are_refused() -> None:
    def loss(value: Any) -> jax.Array:
        with activation_mesh(mesh_of("sp=2")):
            return (
                attend(jnp.asarray(QUERY), jnp.asarray(KEY), value, PLAIN, mechanism="ring", scale=1.0)[0] ** 2
            ).sum()

    with pytest.raises(easydel.UnsupportedError, match="second derivatives"):
        jax.make_jaxpr(jax.grad(lambda value: jax.grad(loss)(value).sum()))(jnp.asarray(VALUE))
