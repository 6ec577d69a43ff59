"""The page on eLargeModel names every section and field, with the defaults they have."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import yaml

from easydel import DataConfig, LossConfig, TrainingArguments, eLargeModel
from easydel.training.elarge import SECTIONS
from easydel.training.model_section import ModelSection
from easydel.training.yaml_files import read_yaml
from tests.docs.field_tables import MARKED, PAGE, descriptions, tables, written

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "write the page's tables anew: python -m tests.docs.field_tables"
    assert {match["section"] for match in MARKED.finditer(page)} == tables().keys() == {*SECTIONS} - {"mesh"}


def test_every_field_is_described():
    for cls in (ModelSection, DataConfig, LossConfig, TrainingArguments):
        assert descriptions(cls).keys() == {field.name for field in dataclasses.fields(cls)}, cls.__name__


def test_the_complete_file_is_one_and_names_every_section():
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    complete = read_yaml(blocks[0], "the page")
    assert complete.keys() == {*SECTIONS}
    made = eLargeModel(complete)
    assert made.train_data.format == "chat"
    assert made.arguments.early_stopping_patience is not None
    for block in blocks[1:]:
        eLargeModel(complete | read_yaml(block, "the page"))


def test_the_example_is_a_run():
    content = yaml.safe_load((ROOT / "examples" / "finetune.yaml").read_text(encoding="utf-8"))
    assert eLargeModel(content).arguments.max_steps == 40
