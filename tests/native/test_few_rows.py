"""The kernel for a few rows: its numbers, its derivatives, where it is chosen, and life without it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel import native
from easydel.layers import Linear
from easydel.native import library

RNG = np.random.default_rng(0)
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
# One rounding of float32 for each of the additions that follow one another in a sum of 8 terms per step, and more.
TOLERANCE = 2e-6
WIDE = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def one(x, kernel):
    return native.few_rows(x, [kernel])[0]


def calls_kernel(function, *args) -> bool:
    return "easydel_few_rows" in jax.jit(function).lower(*args).as_text()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 32])
@pytest.mark.parametrize("shape", [(576, 1536), (1537, 577), (7, 10_001), (70_003, 1), (8, 3)], ids=str)
def test_equals_the_product_in_float64(rows, shape):
    x, kernel = normal(rows, shape[0]), normal(*shape)
    want = x.astype(np.float64) @ kernel.astype(np.float64)
    scale = np.abs(x) @ np.abs(kernel)  # of the terms that are summed
    assert np.all(np.abs(jax.jit(one)(x, kernel) - want) <= TOLERANCE * scale)


@needs_kernels
@pytest.mark.parametrize("rows", [3, 7])
def test_several_together_equal_each_alone(rows):
    x, kernels = normal(rows, 300), [normal(300, width) for width in (301, 7, 64)]
    scales = [np.abs(x) @ np.abs(kernel) for kernel in kernels]
    together = jax.jit(native.few_rows)(x, kernels)
    for got, kernel, scale in zip(together, kernels, scales, strict=True):
        want = x.astype(np.float64) @ kernel.astype(np.float64)
        assert np.all(np.abs(got - want) <= TOLERANCE * scale)
    got = jax.jit(jax.grad(lambda x: sum(y.sum() for y in native.few_rows(x, kernels))))(x)
    np.testing.assert_allclose(got, np.broadcast_to(sum(k.sum(axis=1) for k in kernels), x.shape), rtol=1e-5, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(("least", "most"), [(1, 4), (5, 16)], ids=["read at once", "more rows"])
def test_a_row_does_not_depend_on_its_company(least, most):
    x, kernel = normal(most, 513), normal(513, 300)
    together = one(x, kernel)
    for row in range(most - least + 1):
        np.testing.assert_array_equal(one(x[row : row + least], kernel)[0], together[row])


@needs_kernels
def test_a_kernel_of_a_stack_is_read_where_it_lies():
    x, stack = normal(2, 300), jnp.asarray(normal(3, 300, 301))

    def each(x, stack):
        def step(_, place):
            kernel = jax.lax.dynamic_index_in_dim(stack, place, keepdims=False)
            with native.kernels_are_sliced([native.Slice(kernel, stack, place)]):
                return None, one(x, kernel)

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    text = jax.jit(each).lower(x, stack).compile().as_text()
    assert "easydel_few_rows" in text
    assert "f32[300,301]" not in text  # no layer's matrix is made
    np.testing.assert_array_equal(jax.jit(each)(x, stack), jnp.stack([one(x, kernel) for kernel in stack]))
    want = jax.jit(jax.grad(lambda x, stack: (x @ stack).sum(), (0, 1)))(x, stack)
    for got, wanted in zip(jax.grad(lambda *args: each(*args).sum(), (0, 1))(x, stack), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@needs_kernels
def test_derivatives_are_those_of_the_product():
    x, kernel, cotangent = normal(2, 300), normal(300, 301), normal(2, 301)
    got, pull = jax.vjp(one, x, kernel)
    want, pull_plain = jax.vjp(jnp.matmul, x, kernel)
    for got_one, other in zip((got, *pull(cotangent)), (want, *pull_plain(cotangent)), strict=True):
        np.testing.assert_allclose(got_one, other, rtol=1e-5, atol=1e-4)
    _, pushed = jax.jvp(one, (x, kernel), (x, kernel))
    np.testing.assert_allclose(pushed, 2 * want, rtol=1e-5, atol=1e-4)
    many = jax.vmap(one, in_axes=(0, None))(np.stack([x, 2 * x]), kernel)
    np.testing.assert_allclose(many[1], 2 * want, rtol=1e-5, atol=1e-4)


def layer(**options) -> Linear:
    return Linear(256, 512, rngs=nnx.Rngs(0), **{"dtype": jnp.float32, "param_dtype": jnp.float32} | options)


@needs_kernels
def test_a_linear_layer_takes_it_for_few_rows_only():
    linear, x = layer(use_bias=True, bias_init=nnx.initializers.ones), jnp.asarray(normal(2, 2, 256))
    assert calls_kernel(linear, x)
    assert not calls_kernel(linear, jnp.ones((3, 11, 256)))
    assert not calls_kernel(layer(dtype=jnp.bfloat16), x)
    assert not calls_kernel(Linear(64, 64, rngs=nnx.Rngs(0)), jnp.ones((1, 1, 64)))
    want = np.asarray(x, np.float64) @ np.asarray(linear.kernel.get_value(), np.float64) + 1
    np.testing.assert_allclose(linear(x), want, atol=1e-5)


@needs_kernels
def test_a_precision_is_left_to_xla_where_products_are_cut_short(monkeypatch):
    x = jnp.asarray(normal(2, 2, 256))
    assert calls_kernel(layer(precision="highest"), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not calls_kernel(layer(precision="highest"), x)


@needs_kernels
def test_a_model_on_several_devices_goes_without():
    config = easydel.LlamaConfig(**WIDE, num_attention_heads=4, sharding_axis_dims=(1, 4, 1, 2, 1))
    model = easydel.LlamaForCausalLM(config)
    ids = jnp.ones((1, 1), jnp.int32)
    forward = model.pure_transform_fn()
    assert calls_kernel(lambda params: forward(params, {"input_ids": ids}).logits, model.params)
    model.shard_model()
    forward = model.pure_transform_fn()
    assert not calls_kernel(lambda params: forward(params, {"input_ids": ids}).logits, model.params)


@needs_kernels
def test_generation_is_the_same_without_it(monkeypatch):
    config = easydel.LlamaConfig(**WIDE, num_attention_heads=4, initializer_range=0.3)
    model = easydel.LlamaForCausalLM(config)
    ids = np.arange(8, dtype=np.int32)[None]
    made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False).sequences
    monkeypatch.setattr(library, "is_available", lambda: False)
    config.attn_block_size = 64  # another structure, so that nothing compiled before is used
    plain = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False).sequences
    np.testing.assert_array_equal(made, plain)
