"""The tables of docs/elarge_model.md, made of the settings' own docstrings.

`python -m tests.docs.field_tables` writes them into the page.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from easydel import DataConfig, LoraConfig, LossConfig, TrainingArguments
from easydel.training.elarge import ARGUMENTS
from easydel.training.model_section import ModelSection, QuantizationSection

PAGE = Path(__file__).parents[2] / "docs" / "elarge_model.md"
MARKED = re.compile(r"<!-- fields: (?P<section>\w+) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)


def descriptions(cls: type) -> dict[str, str]:
    """Return what a docstring's `Attributes` say of each field."""
    text = (cls.__doc__ or "").split("Attributes:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", text + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(said.split()) for name, said in entries}


def default(field: dataclasses.Field[Any]) -> str:
    """Return a default as YAML would have it."""
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return "required"
    words = {"None": "null", "True": "true", "False": "false", "()": "[]"}
    return f"`{words.get(str(value), str(value))}`"


def table(cls: type, names: dict[str, str]) -> str:
    """Return a table of fields, under the names that a section has for them."""
    said, known = descriptions(cls), {field.name: field for field in dataclasses.fields(cls)}
    lines = ["| Field | Default | |", "| --- | --- | --- |"]
    for name, field in names.items():
        lines.append(f"| `{name}` | {default(known[field])} | {said[field].rstrip('.').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """Return the table of each section."""
    elsewhere = {field for names in ARGUMENTS.values() for field in names.values()} | {"loss_config"}
    made = {name: table(TrainingArguments, names) for name, names in ARGUMENTS.items()}
    sections = {
        "model": ModelSection,
        "quantization": QuantizationSection,
        "lora": LoraConfig,
        "data": DataConfig,
        "loss": LossConfig,
    }
    for section, cls in sections.items():
        made[section] = table(cls, {field.name: field.name for field in dataclasses.fields(cls)})
    rest = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in elsewhere]
    return made | {"training": table(TrainingArguments, {name: name for name in rest})}


def written(text: str) -> str:
    """Return a page with its tables as they should be."""
    made = tables()
    return MARKED.sub(lambda m: f"<!-- fields: {m['section']} -->\n{made[m['section']]}<!-- end -->", text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
