"""The README's quickstart runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

README = Path(__file__).parents[2] / "README.md"


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    scope: dict = {}
    exec(compile(code, str(README), "exec"), scope)
    assert capsys.readouterr().out.startswith("def read_lines(path):")
    assert float(scope["loss"]) > 0
    assert int(scope["state"].step) == 1
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "my-model").config.hidden_size == 224
