"""The embedded model is what its card says."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import torch
import transformers

from easydel.assets import embedded_model_path, embedded_text_path, embedded_validation_path
from easydel.cli.text import encode_text
from easydel.training import WindowedText, measure_perplexity


def test_it_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in embedded_model_path().iterdir()}
    assert sum(files.values()) <= 10_000_000
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert len(embedded_text_path().read_text(encoding="utf-8")) > 40_000


def test_the_cards_perplexity_is_reproduced(embedded):
    model, tokenizer = embedded
    card = (embedded_model_path() / "README.md").read_text(encoding="utf-8")
    row = re.search(r"\| `validation.txt`[^|]*\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", card)
    length = int(re.search(r"windows of\s+(\d+) tokens", card)[1])
    text = embedded_validation_path().read_text(encoding="utf-8")
    tokens = np.append(encode_text(tokenizer, text), tokenizer.eos_token_id).astype(np.int32)
    measured = measure_perplexity(model, WindowedText(tokens, length, tokenizer.bos_token_id).eval_batches(8))
    assert measured.tokens == int(row[1].replace(",", ""))
    # The card rounds to three decimals; the rest is the order of float32 sums on another machine.
    assert measured.per_token == pytest.approx(float(row[2]), rel=0.01)
    assert measured.bits_per_byte(len(text.encode())) == pytest.approx(float(row[3]), rel=0.01)


def test_transformers_computes_the_same_logits(embedded):
    model, tokenizer = embedded
    reference = transformers.LlamaForCausalLM.from_pretrained(embedded_model_path(), dtype=torch.float32).eval()
    input_ids = np.array([tokenizer.encode(embedded_validation_path().read_text(encoding="utf-8")[:1500])])
    with torch.no_grad():
        expected = reference(torch.tensor(input_ids)).logits.numpy()
    logits = np.asarray(jax.jit(model.pure_transform_fn())(model.params, {"input_ids": input_ids}).logits)
    # Six layers of float32 sums in another order.
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_the_tokenizer_knows_every_text(embedded):
    tokenizer = embedded[1]
    for text in ("def f(x):\n\treturn x\n", "数 🙂 é\x00", "  spaces  and\r\nlines"):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id == 0
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
