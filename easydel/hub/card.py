"""A short model card for the Hub."""

from __future__ import annotations

PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "masked-lm": "fill-mask",
    "embedding": "feature-extraction",
    "image-text-to-text": "image-text-to-text",
    "speech-seq2seq": "automatic-speech-recognition",
    "image-classification": "image-classification",
}
AUTO = {
    "causal-lm": "ForCausalLM", "sequence-classification": "ForSequenceClassification", "masked-lm": "ForMaskedLM",
    "token-classification": "ForTokenClassification", "seq2seq": "ForSeq2SeqLM",
}  # fmt: skip


def model_card(repo_id: str, *, model_type: str, task: str, class_name: str, parameters: int, dtype: str) -> str:
    """Return the text of `README.md`: what the model is and how to load it in easydel and in transformers."""
    pipeline = f"pipeline_tag: {PIPELINES[task]}\n" if task in PIPELINES else ""
    head = f"---\nlibrary_name: easydel\n{pipeline}tags:\n- easydel\n- jax\n- {model_type}\n---\n"
    auto = AUTO.get(task, "")
    ours = f"AutoEasyDeLModel{auto}" if auto in ("", "ForCausalLM", "ForSequenceClassification") else class_name
    return f"""{head}
# {repo_id.rpartition("/")[2]}

| | |
|---|---|
| architecture | `{class_name}` ({model_type}) |
| task | {task} |
| parameters | {parameters:,} |
| stored in | {dtype} |

With easydel:

```python
from easydel import {ours}

model = {ours}.from_pretrained("{repo_id}")
```

With transformers:

```python
from transformers import AutoModel{auto}

model = AutoModel{auto}.from_pretrained("{repo_id}")
```
"""
