"""Language models of every family: the loss computed from the head in chunks is that of transformers, and no logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel import LossConfig
from easydel.models.tasks import CausalLM
from easydel.sharding import create_mesh
from tests.models.inputs import as_torch, int32, pad
from tests.models.pairs import close, pair
from tests.models.table import FAMILIES, quick

CHUNKED = LossConfig(token_chunk_size=5)  # of 28 tokens: the last chunk is not full
LANGUAGE = ("causal-lm", "masked-lm", "seq2seq")
# Besides each family's main variant: other heads.
OTHERS = [
    ("llama", "tied"),
    ("gemma2", "final_cap_alone"),
    ("gpt2", "tied"),
    ("bert", "untied"),
    ("t5", "unscaled"),
    ("t5", "untied_in_the_file"),
    ("mixtral", "router_logits"),
]
HEADS = [
    *(pytest.param(n, f.main.name, marks=quick(n)) for n, f in FAMILIES.items() if f.main_task in LANGUAGE),
    *OTHERS,
]

# Its scan is summed in another order than transformers': whole logits differ by 1e-5, too (docs/families.md), on some
# processors by more.
BY_SCAN = 2e-5


@pytest.mark.parametrize(("family", "variant"), HEADS)
def test_loss_and_gradients_without_logits(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = pad([case.ids(1, 14)[0], case.ids(1, 9, seed=1)[0]], 14, left=False)
    inputs = case.labelled(ids, mask)
    out = jax.eval_shape(lambda: case.ours(**inputs, loss_config=CHUNKED))
    assert out.logits is None
    assert out.uncomputed_logits is None
    assert out.loss.shape == ()

    case.hf.zero_grad()
    want = case.hf(**as_torch(inputs)).loss
    want.backward()
    loss, gradients = case.run.gradient(**inputs, loss_config=CHUNKED)
    close(loss, want, 1e-5, "loss")
    named = nnx.clone(case.ours).merge_params_dict(gradients).to_torch()
    theirs = {name: p.grad for name, p in case.hf.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert len(theirs) > 10
    for name, gradient in theirs.items():
        close(named[name], gradient, BY_SCAN if family == "mamba2" else 1e-5, name, least=largest)


@pytest.fixture(scope="module")
def llama() -> Any:
    return pair("llama", "tied").ours


IDS = int32(np.random.default_rng(0).integers(4, 90, (4, 8)))


def test_compute_loss_gives_the_metrics_of_whole_logits(llama: Any) -> None:
    loss, metrics = llama.compute_loss(labels=IDS, config=CHUNKED, input_ids=IDS)
    _, expected = llama.compute_loss(labels=IDS, input_ids=IDS)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert loss == metrics["loss"]


def test_a_sequence_to_sequence_model_computes_its_metrics_in_chunks() -> None:
    case = pair("t5", FAMILIES["t5"].main.name)
    ids = case.ids(2, 7)
    chunked, plain = (case.ours.compute_loss(labels=ids, input_ids=ids, config=c)[1] for c in (CHUNKED, None))
    for name, value in plain.items():
        np.testing.assert_allclose(chunked[name], value, rtol=1e-5, err_msg=name)


def test_without_labels_the_logits_stay_uncomputed(llama: Any) -> None:
    out = llama(IDS, loss_config=CHUNKED)
    assert out.logits is None
    assert out.loss is None
    assert out.uncomputed_logits.shape == (4, 8, 96)
    loss, _ = easydel.loss.task_loss("causal-lm", out.uncomputed_logits, IDS, CHUNKED)
    np.testing.assert_allclose(loss, llama(IDS, labels=IDS).loss, rtol=1e-5)


def test_experts_losses_are_added_to_a_loss_in_chunks() -> None:
    case = pair("mixtral", "router_logits")
    inputs = case.labelled(case.ids(2, 9))
    fields = {"auxiliary_loss_coefficient": 0.5, "router_z_loss_coefficient": 0.25}
    both = [case.run(**inputs, loss_config=LossConfig(**fields, token_chunk_size=size)) for size in (None, 4)]
    close(both[1].loss, both[0].loss, 1e-6)
    plain = case.run(**inputs, loss_config=LossConfig(auxiliary_loss_coefficient=0.0)).loss
    close(both[1].loss, plain + 0.5 * both[1].auxiliary_loss + 0.25 * both[1].router_z_loss, 1e-6)


def test_bfloat16_models_lose_no_more_than_rounding() -> None:
    case = pair("llama", "tied")
    model = nnx.clone(case.ours).to_dtype(jnp.bfloat16)
    chunked, plain = (model(IDS, labels=IDS, loss_config=c).loss for c in (CHUNKED, None))
    assert chunked.dtype == jnp.float32
    # Whole logits, of size ~4, are rounded to 8 bits: each is off by up to 1/128.
    np.testing.assert_allclose(chunked, plain, atol=1 / 128)


def test_on_eight_devices_it_is_the_same() -> None:
    config = easydel.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = easydel.LlamaForCausalLM(config, rngs=nnx.Rngs(0))
    ids = IDS % 64
    ids = jnp.concatenate([ids, ids[::-1]])

    def step(model: Any) -> Any:
        pure = model.pure_transform_fn()
        inputs = {"input_ids": ids, "labels": ids}
        return jax.jit(jax.value_and_grad(lambda p: pure(p, inputs, loss_config=CHUNKED).loss))(model.params)

    alone, sharded = step(model), step(nnx.clone(model).shard_model(mesh=create_mesh((1, 2, 1, 2, 2))))
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# ---------------------------------------------------------------------- heads that have no chunks
class Scaled(CausalLM):
    backbone_class = easydel.LlamaModel

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        return super().compute_logits(hidden) * 2


class Wrapped(nnx.Module):
    def __init__(self, inner: nnx.Module) -> None:
        self.inner = inner

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return self.inner(hidden)  # type: ignore[operator]


TINY = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_heads_that_cannot_be_cut_refuse() -> None:
    config = easydel.LlamaConfig(**TINY)
    with pytest.raises(easydel.UnsupportedError, match=r"token_chunk_size is not supported by Scaled.*compute_logits"):
        Scaled(config)(IDS, labels=IDS, loss_config=CHUNKED)
    model = easydel.LlamaForCausalLM(config)
    model.lm_head = Wrapped(model.lm_head)
    assert model(IDS, labels=IDS).loss > 0
    with pytest.raises(easydel.UnsupportedError, match="token_chunk_size is not supported with a head of type Wrapped"):
        model(IDS, labels=IDS, loss_config=CHUNKED)
    classifier = easydel.LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="token_chunk_size=5 of the LossConfig does not apply to the task"):
        classifier(IDS, labels=int32([0, 1, 0, 1]), loss_config=CHUNKED)


class OnlyLogits(easydel.EasyDeLBaseModule):
    def __init__(self, config: Any, rngs: Any = None) -> None:
        super().__init__(config)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs or nnx.Rngs(0))

    def __call__(self, input_ids: Any) -> Any:
        return self.embed_tokens.attend(self.embed_tokens(input_ids))


def test_a_class_that_returns_logits_refuses() -> None:
    model = OnlyLogits(easydel.LlamaConfig(**TINY))
    assert model(IDS, labels=IDS).loss > 0
    with pytest.raises(easydel.UnsupportedError, match="token_chunk_size=5 is not supported for logits that are there"):
        model(IDS, labels=IDS, loss_config=CHUNKED)
    with pytest.raises(easydel.UnsupportedError, match="token_chunk_size=5 is not supported for logits that are there"):
        model.compute_loss(labels=IDS, input_ids=IDS, config=CHUNKED)
