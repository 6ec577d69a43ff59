"""A packed document is to a model what the document alone is, whatever the layers are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import easydel
from easydel.training.data import DataConfig, check_batch_fits, make_loader

SMALL = dict(vocab_size=4096, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
GROUPED = SMALL | dict(num_key_value_heads=1, max_position_embeddings=64)
WINDOWS = GROUPED | dict(sliding_window=5, head_dim=8, query_pre_attn_scalar=8)
MODELS = {
    "llama": (easydel.LlamaConfig, easydel.LlamaForCausalLM, GROUPED),
    "gpt2": (easydel.GPT2Config, easydel.GPT2LMHeadModel, dict(vocab_size=4096, n_embd=16, n_layer=1, n_head=2)),
    "gemma2": (easydel.Gemma2Config, easydel.Gemma2ForCausalLM, WINDOWS),
    "mixtral": (easydel.MixtralConfig, easydel.MixtralForCausalLM, GROUPED | dict(num_local_experts=4)),
    "mamba2": (
        easydel.Mamba2Config,
        easydel.Mamba2ForCausalLM,
        dict(vocab_size=4096, hidden_size=16, expand=2, num_heads=4, head_dim=8, state_size=4, num_hidden_layers=1,
             chunk_size=8, n_groups=2),
    ),
}  # fmt: skip
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "import os",
    "x = [1, 2, 3]\nfor y in x:\n    print(y)\n",
    "# a comment",
    "pass",
]


def batch_of(tokenizer, packing: bool):
    """All documents in six rows, some of them empty."""
    config = DataConfig(sequence_length=40, packing=packing, shuffle=False, epochs=1, prefetch=0)
    batches = list(make_loader(TEXTS, tokenizer, batch_size=6, config=config, drop_remainder=False))
    assert len(batches) == 1
    return batches[0]


@pytest.fixture(scope="module")
def batches(tokenizer):
    packed, alone = batch_of(tokenizer, True), batch_of(tokenizer, False)
    assert (packed["segment_ids"].max(axis=1) > 1).any()
    assert (packed["attention_mask"].sum(axis=1) == 0).sum() > (alone["attention_mask"].sum(axis=1) == 0).sum() > 0
    return packed, alone


def documents_of(batch, values):
    """Return the values of each document's labels by its tokens; those of tokens 1, 2, … stand at places 0, 1, …"""
    segments = batch.get("segment_ids", batch["attention_mask"])
    found = {}
    for ids, segment_row, row in zip(batch["input_ids"], segments, values, strict=True):
        for segment in range(1, segment_row.max() + 1):
            (places,) = np.nonzero(segment_row == segment)
            found[tuple(ids[places])] = row[places[:-1]]
    return found


# Learned positions, rotated ones under a window, and states: the slow ones have no other way to see a token.
@pytest.mark.parametrize(
    "name",
    [name if name in ("gpt2", "gemma2", "mamba2") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_packed_equals_unpacked_per_token(name, batches):
    config_class, model_class, fields = MODELS[name]
    model = model_class(config_class(**fields), rngs=nnx.Rngs(0))
    model.eval()
    call = model.pure_transform_fn()
    # New weights make logits that hardly depend on anything.
    params = jax.tree.map(lambda array: 6 * array if array.ndim > 1 else array, model.params)

    def mean(params, batch):
        outputs = call(params, batch)
        log_probs = jax.nn.log_softmax(outputs.logits[:, :-1])
        return outputs.loss, jnp.take_along_axis(log_probs, batch["input_ids"][:, 1:, None], -1)[..., 0]

    run = jax.jit(jax.value_and_grad(mean, has_aux=True))
    results, documents = [], []
    for batch in batches:
        check_batch_fits(model, batch)
        results.append(run(params, batch))
        documents.append(documents_of(batch, np.asarray(results[-1][0][1])))
    packed, alone = documents
    assert packed.keys() == alone.keys()
    assert len(packed) == len(TEXTS)
    for tokens in packed:
        # float32, and sums in another order: a few roundings of numbers up to about 20.
        np.testing.assert_allclose(packed[tokens], alone[tokens], atol=1e-5, rtol=1e-6)
    assert float(results[0][0][0]) == pytest.approx(float(results[1][0][0]), abs=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(grads) for _, grads in results), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(float(jnp.abs(theirs).max()), 1e-2), rtol=0)

    mixed = {key: array for key, array in batches[0].items() if key != "segment_ids"}
    wrong = documents_of(batches[0], np.asarray(jax.jit(mean)(params, mixed)[1]))
    assert max(np.abs(wrong[tokens] - alone[tokens]).max() for tokens in alone) > 1e-2


def test_a_model_that_takes_no_segments_is_refused(batches):
    packed, alone = batches
    with pytest.raises(ValueError, match=r"takes no segment_ids.*packing=False"):
        check_batch_fits(SwallowsAnything, packed)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        check_batch_fits(SwallowsAnything, alone)
    check_batch_fits(SwallowsAnything, {"input_ids", "labels"})


def test_rows_and_tokens_beyond_the_model_are_refused(batches):
    config_class, model_class, fields = MODELS["gpt2"]
    for changes, message in (({"n_positions": 39}, "39 positions; 40 tokens"), ({"vocab_size": 100}, r"in \[0, 100\)")):
        with pytest.raises(ValueError, match=message):
            check_batch_fits(model_class(config_class(**fields | changes), rngs=nnx.Rngs(0)), batches[0])


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BertForMaskedLM"])
def test_a_model_of_another_task_is_refused(name, batches):
    with pytest.raises(ValueError, match=rf"causal language models.*{name}"):
        check_batch_fits(getattr(easydel, name), batches[1])


class SwallowsAnything(easydel.EasyDeLBaseModule):
    def __call__(self, input_ids, **kwargs):
        raise NotImplementedError
