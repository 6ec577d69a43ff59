"""What only T5 has: heads of their own in older checkpoints, names written several times, float16, dropout, FLOPs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

import easydel
from tests.models.pairs import Jitted, Pair, close, load_hf, pair, write
from tests.models.table import FAMILIES

T5 = FAMILIES["t5"]


@pytest.fixture
def case() -> Pair:
    return pair("t5", "gated_gelu")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    """Change a checkpoint's tensors and config."""
    save_file(
        {name: t.clone().contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_untied_head_as_in_the_published_checkpoints_of_version_1_1(case: Pair, tmp_path: Path) -> None:
    write(case.hf, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = torch.randn(tensors["shared.weight"].shape, generator=torch.Generator().manual_seed(1))
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("scale_decoder_outputs")  # older versions did not write it
    (tmp_path / "config.json").write_text(json.dumps(content))
    rewrite(tmp_path, tensors | {"lm_head.weight": head}, tie_word_embeddings=False)
    ours, hf = easydel.T5ForConditionalGeneration.from_pretrained(tmp_path), load_hf(T5, "seq2seq", tmp_path)
    np.testing.assert_array_equal(ours.lm_head.kernel.get_value().T, head)
    assert (ours.config.tie_word_embeddings, ours.config.scale_decoder_outputs) == (False, False)
    inputs = case.inputs(case.ids(2, 9))
    with torch.no_grad():
        want = hf(**{name: torch.from_numpy(ids).long() for name, ids in inputs.items()}).logits
    close(Jitted(ours)(**inputs).logits, want, 1e-4)
    assert not torch.equal(hf.lm_head.weight, hf.shared.weight)

    ours.save_pretrained(tmp_path / "again")
    again = load_hf(T5, "seq2seq", tmp_path / "again")
    torch.testing.assert_close(again.lm_head.weight, head, rtol=0, atol=0)
    other = easydel.T5ForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert other.config == ours.config

    write(hf, tmp_path / "theirs")  # its config says that the head is tied
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["tie_word_embeddings"] is True
    other = easydel.T5ForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    np.testing.assert_array_equal(other.lm_head.kernel.get_value().T, head)
    assert other.config == ours.config
    with pytest.raises(easydel.CheckpointError, match="differs from the tensor"):
        easydel.T5ForConditionalGeneration.from_pretrained(tmp_path / "theirs", tie_word_embeddings=True)
    copied = copy.deepcopy(hf)
    copied.load_state_dict(ours.to_torch(), strict=True)


def test_all_names_that_checkpoints_have_used(case: Pair, tmp_path: Path) -> None:
    write(case.hf, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table, stray = (
        tensors.pop("shared.weight"),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    for held in (names, names[1:2], names[3:]):
        rewrite(tmp_path, tensors | dict.fromkeys(held, table) | {stray: torch.zeros(12, 4)})
        ours = easydel.T5ForConditionalGeneration.from_pretrained(tmp_path)
        np.testing.assert_array_equal(ours.model.embed_tokens.embedding.get_value(), table)
    rewrite(tmp_path, tensors | {"shared.weight": table, "lm_head.weight": table + 1})
    with pytest.raises(easydel.CheckpointError, match="tie_word_embeddings=False"):
        easydel.T5ForConditionalGeneration.from_pretrained(tmp_path)
    ours = easydel.T5ForConditionalGeneration.from_pretrained(tmp_path, tie_word_embeddings=False)
    np.testing.assert_array_equal(ours.lm_head.kernel.get_value().T, table + 1)


def test_float16_that_overflows_stays_finite(case: Pair) -> None:
    half = nnx.clone(case.ours).half()
    half.model.encoder.layers[0].mlp.down_proj.kernel.set_value(jnp.full((48, 32), 6e4, jnp.float16))
    out = half(**case.inputs(case.ids(1, 4)), output_hidden_states=True)
    assert float(jnp.abs(out.encoder_hidden_states[1]).max()) == float(jnp.finfo(jnp.float16).max)
    assert np.isfinite(np.asarray(out.logits, np.float32)).all()


@pytest.mark.parametrize("place", ["embeddings", "attention", "cross", "mlp", "residual", "output"])
def test_dropout_is_wherever_transformers_has_it(case: Pair, place: str) -> None:
    model = nnx.clone(case.ours)
    side, block = model.model.decoder, model.model.decoder.layers[0]
    owner = {
        "embeddings": side, "attention": block.self_attn, "cross": block.cross_attn, "mlp": block.mlp,
        "residual": block, "output": side,
    }[place]  # fmt: skip
    assert owner.dropout.rate == case.hf.config.dropout_rate == 0.1
    owner.dropout.deterministic = False
    inputs = case.inputs(case.ids(2, 9))
    assert float(jnp.abs(model(**inputs).logits - case.ours(**inputs).logits).max()) > 1e-3


def test_training_drops_at_transformers_rate(case: Pair) -> None:
    """Averaged over many draws, both libraries lose the same share: the rate is right, and not applied twice."""
    inputs = case.inputs(case.ids(1, 6))
    pure, params = case.ours.pure_transform_fn(), case.ours.params
    keys = jax.random.split(jax.random.key(0), 400)
    ours = jax.jit(jax.vmap(lambda key: pure(params, inputs, rngs=key).encoder_last_hidden_state))(keys)
    hf = copy.deepcopy(case.hf).train()
    torch.manual_seed(0)
    with torch.no_grad():
        ids = torch.from_numpy(inputs["input_ids"]).long().repeat(400, 1)
        theirs = hf.encoder(ids).last_hidden_state.numpy()
    zeros = [float((np.asarray(states) == 0).mean()) for states in (ours, theirs)]
    assert abs(zeros[0] - zeros[1]) < 0.01  # 76,800 draws of a tenth: a deviation of 0.001
    spread = [float(np.asarray(states).reshape(400, -1).std(axis=0).mean()) for states in (ours, theirs)]
    assert abs(spread[0] / spread[1] - 1) < 0.05  # 400 draws give a standard deviation within a few percent


def test_flops_are_the_formula() -> None:
    config = easydel.T5Config(**T5.config | {"num_decoder_layers": 3})
    model = nnx.eval_shape(lambda: easydel.T5ForConditionalGeneration(config))
    batch, seq, hidden, inner = 2, 16, 32, 32
    attention = 4 * hidden * inner + 2 * seq * inner  # q, k, v, o, and both products
    mlp = 2 * hidden * 48
    per_token = 2 * (attention + mlp) + 3 * (2 * attention + mlp) + hidden * 96
    assert model._flop(config, batch, seq) == 2 * batch * seq * per_token


def test_the_encoder_sees_both_ways_and_the_decoder_only_back(case: Pair) -> None:
    ids = case.ids(1, 8)
    changed = ids.copy()
    changed[0, -1] = (changed[0, -1] + 1) % 90
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    plain, encoder, decoder = (
        case.run(**inputs | change) for change in ({}, {"input_ids": changed}, {"decoder_input_ids": changed})
    )
    assert float(jnp.abs(plain.encoder_last_hidden_state - encoder.encoder_last_hidden_state)[0, 0].max()) > 1e-3
    np.testing.assert_array_equal(plain.logits[:, :-1], decoder.logits[:, :-1])
    assert isinstance(case.hf, transformers.T5ForConditionalGeneration)
