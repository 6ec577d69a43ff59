"""The loss computed from a head a few tokens at a time: against torch in float64, and against whole logits."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LossConfig, UnsupportedError
from easydel.loss import UncomputedLogits, task_loss
from easydel.sharding import activation_mesh, constrain, create_mesh

RNG = np.random.default_rng(0)
BATCH, LENGTH, WIDTH, VOCAB = 2, 9, 6, 23
HIDDEN = RNG.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
KERNEL = RNG.normal(size=(WIDTH, VOCAB)).astype(np.float32)
BIAS = RNG.normal(size=VOCAB).astype(np.float32)
LABELS = RNG.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
LABELS[0, 2] = LABELS[1, 6:] = -100


def by_torch(labels, *, bias, soft_cap, smoothing=0.0, z=0.0, divisor=None, shift=False):
    """Return loss and gradients by hidden states, kernel and bias, in float64."""
    import torch

    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (HIDDEN, KERNEL, BIAS)]
    logits = leaves[0] @ leaves[1] + (leaves[2] if bias else 0)
    if soft_cap is not None:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    targets = torch.tensor(labels).long()
    if shift:
        logits, targets = logits[:, :-1], targets[:, 1:]
    logits, targets = logits.reshape(-1, VOCAB), targets.reshape(-1)
    kept = targets != -100
    kwargs = {"reduction": "sum", "label_smoothing": smoothing}
    loss = torch.nn.functional.cross_entropy(logits[kept], targets[kept], **kwargs)
    loss = (loss + z * (torch.logsumexp(logits[kept], -1) ** 2).sum()) / (divisor or kept.sum())
    loss.backward()
    return loss.item(), [x.grad.numpy() if x.grad is not None else None for x in leaves]


def value_and_gradients(config, labels=LABELS, *, bias=True, transposed=False, soft_cap=None, task="seq2seq"):
    def loss_of(hidden, kernel, bias_):
        logits = UncomputedLogits(hidden, kernel.T if transposed else kernel, bias_, transposed, soft_cap)
        return task_loss(task, logits, labels, config)

    arguments = (HIDDEN, KERNEL, BIAS if bias else None)
    wrt = (0, 1, 2) if bias else (0, 1)
    return jax.jit(jax.value_and_grad(loss_of, wrt, has_aux=True))(*arguments)


CASES = {
    "plain": ({}, {"bias": False}, {}),
    "bias": ({}, {}, {}),
    "one_token": ({"token_chunk_size": 1}, {}, {}),
    "all_at_once": ({"token_chunk_size": 1000}, {}, {}),
    "auto": ({"token_chunk_size": "auto"}, {}, {}),
    "embedding": ({}, {"transposed": True, "bias": False}, {}),
    "embedding_bias_cap": ({"label_smoothing": 0.2, "z_loss_coefficient": 0.1}, {"transposed": True, "soft_cap": 2.0},
                           {"smoothing": 0.2, "z": 0.1}),
    "smoothing": ({"label_smoothing": 0.1}, {}, {"smoothing": 0.1}),
    "z_loss": ({"z_loss_coefficient": 0.05}, {}, {"z": 0.05}),
    "soft_cap": ({}, {"soft_cap": 1.5}, {}),
    "sum": ({"reduction": "sum"}, {}, {"divisor": 1}),
    "factor": ({"loss_normalizing_factor": 7.5}, {}, {"divisor": 7.5}),
    "shifted": ({}, {"task": "causal-lm"}, {"shift": True}),
    "shifted_on_request": ({"shift_tokens": True}, {}, {"shift": True}),
    "not_shifted": ({"shift_tokens": False}, {"task": "causal-lm"}, {}),
}  # fmt: skip


# In several blocks those that change what a block computes; 23 classes: the last block is not full.
IN_BLOCKS = ("plain", "bias", "embedding_bias_cap")


@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param(name, block, id=f"{name}-blocks" if block == 5 else name, marks=[pytest.mark.slow] if slow else [])
        for name in CASES
        for block, slow in (
            (8192, name in ("one_token", "shifted_on_request", "smoothing", "z_loss")),
            (5, name not in IN_BLOCKS),
        )
    ],
)
def test_loss_and_gradients_are_those_of_torch(name, block, monkeypatch):
    monkeypatch.setattr("easydel.loss.chunked.BLOCK", block)
    fields, how, formula = CASES[name]
    config = LossConfig(**{"token_chunk_size": 4} | fields)  # 18 tokens: the last chunk is not full
    (loss, metrics), gradients = value_and_gradients(config, **how)
    head = {"bias": how.get("bias", True), "soft_cap": how.get("soft_cap")}
    expected, theirs = by_torch(LABELS, **head, **formula)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # float32 sums
    for got, want in zip(gradients, theirs, strict=False):
        np.testing.assert_allclose(got, want, atol=1e-6 * max(np.abs(want).max(), 1))
    assert metrics["loss"] == loss


@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow), "auto"])
def test_metrics_are_those_of_whole_logits(size):
    coarse = np.round(HIDDEN)  # with a kernel of few values, several tokens tie for the largest logit
    kernel = np.round(KERNEL[:, :5])
    labels = (LABELS % 5).astype(np.int32)
    fields = {"z_loss_coefficient": 0.1, "label_smoothing": 0.1}
    whole = jax.jit(lambda: task_loss("causal-lm", coarse @ kernel, labels, LossConfig(**fields)))()[1]
    chunked = LossConfig(**fields, token_chunk_size=size)
    loss, metrics = jax.jit(lambda: task_loss("causal-lm", UncomputedLogits(coarse, kernel), labels, chunked))()
    assert metrics.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-6, err_msg=name)
    assert loss == metrics["loss"]


def test_eager_values_without_gradient_are_the_same():
    logits = UncomputedLogits(jnp.asarray(HIDDEN), jnp.asarray(KERNEL), jnp.asarray(BIAS))
    loss, metrics = task_loss("seq2seq", logits, LABELS, LossConfig(token_chunk_size=5))
    whole, expected = task_loss("seq2seq", HIDDEN @ KERNEL + BIAS, LABELS)
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    assert metrics["num_tokens"] == expected["num_tokens"]


def test_no_label_at_all_costs_nothing():
    (loss, metrics), gradients = value_and_gradients(LossConfig(token_chunk_size=4), np.full_like(LABELS, -100))
    assert loss == metrics["num_tokens"] == metrics["accuracy"] == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("label", [VOCAB, -99, *(pytest.param(label, marks=pytest.mark.slow) for label in (400, -1))])
def test_a_label_outside_the_vocabulary_gives_nan(label):
    labels = LABELS.copy()
    labels[0, 4] = label
    assert np.isnan(value_and_gradients(LossConfig(token_chunk_size=4), labels)[0][0])


def loss_of(hidden, kernel, labels=LABELS, config=None):
    return task_loss("seq2seq", UncomputedLogits(hidden, kernel), labels, config or LossConfig(token_chunk_size=4))[0]


@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param(jax.checkpoint, marks=pytest.mark.slow),
        pytest.param(jax.jit, marks=pytest.mark.slow),
        lambda f: jax.checkpoint(jax.jit(f)),
    ],
)
def test_gradients_go_through_other_transformations(wrapper):
    want = jax.jit(jax.grad(loss_of, (0, 1)))(HIDDEN, KERNEL)
    got = jax.jit(jax.grad(lambda h, k: 2 * wrapper(loss_of)(h, k), (0, 1)))(HIDDEN, KERNEL)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, 2 * other, atol=1e-6)


def test_gradients_go_through_a_scan_and_a_vmap():
    def accumulated(kernel):
        def step(total, hidden):
            return total + loss_of(hidden, kernel), None

        return jax.lax.scan(step, 0.0, jnp.stack([HIDDEN, 2 * HIDDEN]))[0]

    want = jax.jit(jax.grad(lambda k: loss_of(HIDDEN, k) + loss_of(2 * HIDDEN, k)))(KERNEL)
    np.testing.assert_allclose(jax.jit(jax.grad(accumulated))(KERNEL), want, atol=1e-6)
    mapped = jax.grad(lambda k: jax.vmap(loss_of, (0, None))(jnp.stack([HIDDEN, 2 * HIDDEN]), k).sum())
    np.testing.assert_allclose(jax.jit(mapped)(KERNEL), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision_weights_are_summed_in_float32(dtype):
    hidden, kernel = jnp.asarray(HIDDEN, dtype), jnp.asarray(KERNEL, dtype)
    run = jax.jit(jax.value_and_grad(loss_of, (0, 1)))
    loss, gradients = run(hidden, kernel)
    wide = [x.astype(jnp.float32) for x in (hidden, kernel)]
    exact, expected = run(*wide)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)  # logits are not rounded in between
    for got, want in zip(gradients, expected, strict=True):
        assert got.dtype == dtype
        # Rounded are the logits' gradient, the result, and the result times the divisor: three half units each.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2 * jnp.finfo(dtype).eps * np.abs(want).max())


def test_arithmetic_in_half_precision_is_rounded_but_close():
    config = LossConfig(token_chunk_size=4, compute_dtype=jnp.bfloat16)
    rough, exact = loss_of(HIDDEN, KERNEL, config=config), loss_of(HIDDEN, KERNEL)
    assert rough.dtype == jnp.float32
    assert rough != exact
    np.testing.assert_allclose(rough, exact, rtol=2**-7)  # two units of bfloat16, whose mantissa has 8 bits


def test_micro_batches_combine_to_one_batch():
    def task_loss_of(hidden, kernel, labels):
        return task_loss("seq2seq", UncomputedLogits(hidden, kernel), labels, LossConfig(token_chunk_size=4))

    run = jax.jit(jax.value_and_grad(task_loss_of, 1, has_aux=True))
    (whole, _), expected = run(HIDDEN, KERNEL, LABELS)
    parts = []
    for row in range(BATCH):
        (loss, metrics), gradient = run(HIDDEN[row, None], KERNEL, LABELS[row, None])
        parts.append((metrics["num_tokens"], loss, gradient))
    weights = [count for count, _, _ in parts]
    assert weights[0] != weights[1]
    total = sum(weights)
    np.testing.assert_allclose(sum(n * loss for n, loss, _ in parts) / total, whole, rtol=1e-6)
    np.testing.assert_allclose(sum(n * gradient for n, _, gradient in parts) / total, expected, atol=1e-6)


# ---------------------------------------------------------------------- memory
def compiled(tokens, width, vocab, config):
    """Compile loss and gradients of whole logits, or of a chunked config, without any numbers."""

    def loss(hidden, kernel, labels):
        given = UncomputedLogits(hidden, kernel) if config else jnp.einsum("bsh,hv->bsv", hidden, kernel)
        return task_loss("causal-lm", given, labels, config)[0]

    shapes = [((1, tokens, width), jnp.float32), ((width, vocab), jnp.float32), ((1, tokens), jnp.int32)]
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*abstract).compile()


def test_an_eighth_of_the_memory_at_qwen_s_vocabulary():
    sizes = (4096, 576, 151936)
    plain, auto = (
        compiled(*sizes, config).memory_analysis().temp_size_in_bytes
        for config in (None, LossConfig(token_chunk_size="auto"))
    )
    assert plain > 4 * sizes[0] * sizes[2]  # the logits at least
    assert auto <= plain / 8


# ---------------------------------------------------------------------- many devices
ROWS, TOKENS, FEATURES, CLASSES = 8, 16, 40, 64
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def sharded_step(dims, kernel_spec, config, transposed=False):
    mesh = create_mesh(dims)
    rng = np.random.default_rng(1)
    shape = (CLASSES, FEATURES) if transposed else (FEATURES, CLASSES)
    labels = rng.integers(0, CLASSES, (ROWS, TOKENS)).astype(np.int32)
    labels[0, 3:] = -100
    given = (rng.normal(size=(ROWS, TOKENS, FEATURES)).astype(np.float32), rng.normal(size=shape).astype(np.float32))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kernel_spec))

    def loss(hidden, kernel, on):
        with activation_mesh(on):
            hidden = constrain(hidden, "batch", "sequence", None)
            return task_loss("seq2seq", UncomputedLogits(hidden, kernel, None, transposed), labels, config)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    placed = (given[0], jax.device_put(given[1], sharding))
    alone = run(*given, None)
    program = run.lower(*placed, mesh).compile()
    return alone, program(*placed), program.as_text()


DIMS = [(1, 8, 1, 1, 1), (1, 1, 1, 8, 1), (1, 2, 1, 4, 1), (2, 1, 1, 2, 2)]
ALSO_TRANSPOSED = DIMS[2:3]


@pytest.mark.parametrize(
    ("dims", "transposed"),
    [
        *(pytest.param(dims, False, id=f"{dims}-head") for dims in DIMS),
        *(
            pytest.param(
                dims, True, id=f"{dims}-embedding", marks=[] if dims in ALSO_TRANSPOSED else [pytest.mark.slow]
            )
            for dims in DIMS
        ),
    ],
)
def test_eight_devices_compute_the_same_and_never_exchange_logits(dims, transposed):
    spec = ("tp", "fsdp") if transposed else ("fsdp", "tp")
    config = LossConfig(token_chunk_size=4, z_loss_coefficient=0.01)
    alone, sharded, text = sharded_step(dims, spec, config, transposed)
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * max(np.abs(other).max(), 1))
    data, chunk = dims[0] * dims[1] * dims[4], 4
    local = chunk * CLASSES // dims[3]
    in_loop = re.findall(r"^%?[\w.-]*(?:body|region|while)[\w.-]* .*?^}", text, re.MULTILINE | re.DOTALL)
    moved = [(kind, sizes(shape)) for shape, kind in COLLECTIVE.findall(text)]
    assert moved, "devices must add up their losses"
    rounds = ROWS * TOKENS // data // chunk
    groups = "1,1," if data > 1 else ""
    assert f"f32[{rounds},{groups}{chunk},{FEATURES}]" in text, "each device takes its own tokens only"
    weights = FEATURES * CLASSES
    for kind, found in moved:
        # The weights and their gradient may travel, and hidden states; logits would be chunk·CLASSES or more.
        assert max(found) != local, (kind, found)
        assert max(found) not in (chunk * CLASSES, chunk * data * CLASSES), (kind, found)
    looped = [n for body in in_loop for shape, _ in COLLECTIVE.findall(body) for n in sizes(shape)]
    assert all(n < weights // dims[3] // 8 or n == chunk * FEATURES for n in looped), looped
    if dims[3] > 1:
        assert looped, "the vocabulary is split, so each chunk's sums go over devices"


def sizes(shape):
    """Return how many numbers each array of an HLO type has."""
    return [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", shape)]


# ---------------------------------------------------------------------- refusals
def test_chunks_need_uncomputed_logits_and_the_other_way_round():
    with pytest.raises(UnsupportedError, match=r"token_chunk_size=4 is not supported for logits that are there"):
        task_loss("causal-lm", HIDDEN @ KERNEL, LABELS, LossConfig(token_chunk_size=4))
    with pytest.raises(ValueError, match="need a LossConfig with token_chunk_size"):
        task_loss("causal-lm", UncomputedLogits(HIDDEN, KERNEL), LABELS)
    with pytest.raises(ValueError, match="'token-classification'"):
        task_loss("token-classification", UncomputedLogits(HIDDEN, KERNEL), LABELS, LossConfig(token_chunk_size=4))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 8\) do not fit logits of shape \(2, 9, 23\)"):
        task_loss("causal-lm", UncomputedLogits(HIDDEN, KERNEL), LABELS[:, 1:], LossConfig(token_chunk_size=4))
