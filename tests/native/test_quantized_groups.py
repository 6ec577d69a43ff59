"""Groups of rows times quantized weights, and weights read from stacks, against float64 formulas of numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import native
from easydel.native import library
from easydel.native.codes import KINDS
from tests.native.test_quantized import RNG, TOLERANCE, inputs_of, needs_kernels, weights

SIZES = np.int32([2, 0, 5, 1])


def stack(kind: str, inputs: int, outputs: int, group: int, count: int = 4) -> list[np.ndarray]:
    """Return codes, scales, integer codes and float64 weights, each of so many layers behind one another."""
    return [
        np.stack(parts) for parts in zip(*(weights(kind, inputs, outputs, group) for _ in range(count)), strict=True)
    ]


def wanted(x: np.ndarray, each: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    out, first = np.zeros((len(x), each.shape[1])), 0
    for weight, size in zip(each, sizes, strict=True):
        out[first : first + size] = x[first : first + size].astype(np.float64) @ weight.T
        first += size
    return out


def assert_close(got, x, each, sizes, tolerance=TOLERANCE) -> None:
    bound = tolerance * wanted(np.abs(x), np.abs(each), sizes)
    assert np.all(np.abs(np.asarray(got, np.float64) - wanted(x, each, sizes)) <= bound)  # 0 where nobody's rows are


@pytest.mark.parametrize("with_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "shape", "sizes"),
    [
        (10, (130, 37, 64), SIZES),
        pytest.param(8, (45, 3, 64), [1, 0, 0, 4], marks=pytest.mark.slow),
        (40, (576, 130, 64), [0, 39, 0, 1]),
    ],
    ids=str,
)
def test_each_row_meets_its_weight(kind, rows, shape, sizes, with_kernels, monkeypatch):
    monkeypatch.setattr(library, "serves_quantized", lambda: with_kernels)
    codes, scales, _, each = stack(kind, *shape)
    sizes, options = np.int32(sizes), {"kind": kind, "group_size": shape[2]}
    x = inputs_of(rows, shape[0])
    assert native.serves_quantized_groups(x, codes, scales, sizes, **options) is with_kernels
    got = jax.jit(functools.partial(native.quantized_groups, **options))(x, codes, scales, sizes)
    # Weights made whole are multiplied by XLA, which adds up all inputs in a chain, eight or more at a time.
    is_whole = not with_kernels and rows > native.MOST_ROWS
    assert_close(got, x, each, sizes, max(TOLERANCE, shape[0] / 8 * 6e-8) if is_whole else TOLERANCE)
    if kind != "nf4":
        whole = RNG.integers(-128, 128, (rows, shape[0])).astype(np.int8)
        got = jax.jit(functools.partial(native.integer_groups, **options))(whole, codes, scales, sizes)
        assert_close(got, whole.astype(np.float64), each, sizes)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_read_from_their_stacks(kind):
    """In a scan: of layers' weights, and of layers' experts' weights; with not one copy of codes in the program."""
    codes, scales, _, each = stack(kind, 576, 30, 64, 6)
    x, options = inputs_of(2, 576), {"kind": kind, "group_size": 64}
    sizes = np.int32([0, 1, 1])

    def both(x, codes, scales):
        experts = [part.reshape(2, 3, *part.shape[1:]) for part in (codes, scales)]

        def step(total, layer):
            one, many = [part[layer] for part in (codes, scales)], [part[layer // 3] for part in experts]
            stacks = zip([*one, *many], [codes, scales, *experts], [layer, layer, layer // 3, layer // 3], strict=True)
            with native.kernels_are_sliced([native.Slice(*entry) for entry in stacks]):
                single = native.quantized_rows(x, *one, **options)
                grouped = native.quantized_groups(x, *many, sizes, **options)
                integer = None if kind == "nf4" else native.integer_rows(jnp.int8(x), *one, **options)
            return total, (single, grouped, integer)

        return jax.lax.scan(step, 0, jnp.arange(6))[1]

    compiled = jax.jit(both).lower(x, codes, scales).compile()
    single, grouped, integer = compiled(x, codes, scales)
    whole = np.asarray(jnp.int8(x), np.float64)
    for layer in range(6):
        assert_close(single[layer], x, each[layer : layer + 1], [2])
        assert_close(grouped[layer], x, each[layer // 3 * 3 :][:3], sizes)
        if integer is not None:
            assert_close(integer[layer], whole, each[layer : layer + 1], [2])
    dtype = "s8" if kind == "int8" else "u8"
    made = [line for line in compiled.as_text().splitlines() if f"= {dtype}[30," in line or f"= {dtype}[1,30," in line]
    assert not made, "a slice of codes was copied"


@needs_kernels
def test_sizes_that_cannot_be_read_nothing_they_should_not():
    codes, scales, _, each = stack("int8", 64, 8, 32, 2)
    x = inputs_of(3, 64)
    groups = functools.partial(native.quantized_groups, kind="int8", group_size=32)
    assert_close(groups(x, codes, scales, np.int32([-5, 100])), x, each, [0, 3])


def test_arrays_that_do_not_belong_together_are_refused():
    codes, scales, _, _ = stack("int8", 64, 8, 32)
    x = np.ones((2, 64), np.float32)
    for change, words in (
        ({"codes": codes[0]}, r"expected \[weights, out, …\]"),
        ({"sizes": SIZES[:2]}, "one size for each weight"),
        ({"sizes": SIZES.astype(np.float32)}, "expected int32"),
        ({"x": x[:, :60]}, r"expected int8 \(8, 60\)"),
    ):
        given = {"x": x, "codes": codes, "scales": scales, "sizes": SIZES, "kind": "int8", "group_size": 32} | change
        with pytest.raises(ValueError, match=words):
            native.quantized_groups(**given)
    with pytest.raises(ValueError, match="expected int8 inputs"):
        native.integer_groups(x, codes, scales, SIZES, kind="int8", group_size=32)
