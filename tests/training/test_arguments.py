"""Fields by name: what is unknown, of another type or contradictory is refused; what is known has an effect."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import easydel.training
from easydel import DataConfig, LossConfig, TrainingArguments
from easydel.errors import ShardingError
from easydel.fields import read_fields
from easydel.sharding import create_mesh
from easydel.training.checks import check_batch, check_run
from easydel.training.yaml_files import read_yaml


@dataclasses.dataclass
class Sample:
    count: int = 1
    rate: float | None = None
    name: str = ""
    on: bool = False
    names: tuple[str, ...] | None = None
    patterns: str | list[str] | None = None
    size: int | str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss: LossConfig | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"rate": "1e-4", "count": "3"}, {"rate": 1e-4, "count": 3}),
        ({"rate": 2, "on": True}, {"rate": 2.0, "on": True}),
        ({"rate": None, "names": None}, {"rate": None, "names": None}),
        ({"names": ["a", "b"], "patterns": "a"}, {"names": ("a", "b"), "patterns": "a"}),
        ({"patterns": ["a"], "size": "auto"}, {"patterns": ("a",), "size": "auto"}),
        ({"extra": {"a": 1}, "anything": object}, {"extra": {"a": 1}, "anything": object}),
        ({"loss": {"z_loss_coefficient": "1e-4"}}, {"loss": LossConfig(z_loss_coefficient=1e-4)}),
    ],
)
def test_values_are_read_as_their_fields_types(values, read):
    got = read_fields(Sample, values)
    assert got == read
    assert {name: type(value) for name, value in got.items()} == {name: type(value) for name, value in read.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.5}, r"Sample.count: expected int, got 1.5"),
        ({"count": True}, r"Sample.count: expected int, got True"),
        ({"count": "1e3"}, r"Sample.count: expected int, got '1e3'"),
        ({"count": None}, r"Sample.count: expected int, got None"),
        ({"rate": "fast"}, r"Sample.rate: expected float or null, got 'fast'"),
        ({"rate": [1]}, r"Sample.rate: expected float or null, got \[1\]"),
        ({"name": 3}, r"Sample.name: expected text, got 3"),
        ({"on": "yes"}, r"Sample.on: expected bool, got 'yes'"),
        ({"on": 1}, r"Sample.on: expected bool, got 1"),
        ({"names": "abc"}, r"Sample.names: expected a list or null, got 'abc'"),
        ({"names": [3]}, r"Sample.names: expected a list or null, got \[3\]"),
        ({"patterns": 3}, r"Sample.patterns: expected text or a list or null, got 3"),
        ({"extra": [1]}, r"Sample.extra: expected a mapping, got \[1\]"),
        ({"loss": 3}, r"Sample.loss: expected a mapping or null, got 3"),
        ({"loss": {"z_los": 1}}, r"Sample.loss: LossConfig has no field 'z_los'; did you mean 'z_loss_coefficient'"),
        ({"cuont": 1, "raet": 2}, r"no field 'cuont'; did you mean 'count'\?\n.*no field 'raet'; did you mean 'rate'"),
        ({3: 1}, r"Sample has no field 3"),
    ],
)
def test_what_does_not_fit_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        read_fields(Sample, values)


@pytest.mark.parametrize("cls", [LossConfig, DataConfig, TrainingArguments])
def test_all_settings_are_made_of_mappings_alike(cls):
    name = next(field.name for field in dataclasses.fields(cls) if field.type == "int")
    given = {"output_dir": "out"} if cls is TrainingArguments else {}
    assert getattr(cls.from_dict(given | {name: "7"}), name) == 7
    with pytest.raises(ValueError, match=f"{cls.__name__} has no field '{name}x'; did you mean '{name}'"):
        cls.from_dict(given | {name + "x": 7})


def test_yaml_is_read_as_it_is_meant():
    text = "a: 1e-4\nb: -2.5E3\nc: 1\nd: [1e3, x1e3, '1e3']\ne: &e {f: 1}\ng: {<<: *e, h: 2}"
    read = {"a": 1e-4, "b": -2500.0, "c": 1, "d": [1000.0, "x1e3", "1e3"], "e": {"f": 1}, "g": {"f": 1, "h": 2}}
    assert read_yaml(text, "x") == read
    with pytest.raises(ValueError, match=r"run\.yaml:3: not YAML: 'a' stands there twice"):
        read_yaml("a: 1\nb: 2\na: 3\n", "run.yaml")
    with pytest.raises(ValueError, match=r"run\.yaml:2: not YAML: "):
        read_yaml("a: [1,\nb: }", "run.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dir": ""}, "output_dir must name a folder"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"batch_size": 8.5}, r"TrainingArguments.batch_size: expected int, got 8.5"),
        ({"max_steps": -1}, "max_steps must be positive"),
        ({"log_to": "console"}, r"log_to: expected a list or null, got 'console'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"adam_beta1": 1.0}, r"adam_beta1 must lie in \[0, 1\), got 1.0"),
        ({"min_learning_rate_ratio": 1.5}, r"min_learning_rate_ratio must lie in \[0, 1\]"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "warmup_steps or warmup_ratio, not both"),
        ({"batch_size": 8, "gradient_accumulation_steps": 3}, "cannot be split"),
        ({"trainable": "a", "frozen": "b"}, "trainable or frozen patterns, not both"),
        ({"max_steps": 10, "num_train_epochs": 2}, "max_steps=10 or num_train_epochs=2, not both"),
        ({"early_stopping_patience": 2}, "set eval_steps"),
        ({"loss_config": LossConfig(reduction="none")}, "reduction 'mean' or 'sum'"),
    ],
)
def test_arguments_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**{"output_dir": "out"} | fields)


def test_the_folder_must_be_named():
    with pytest.raises(ValueError, match="needs output_dir"):
        TrainingArguments.from_dict({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_steps": 2}, "eval_steps: there are no evaluation data"),
        (
            {"load_best_model_at_end": True, "best_metric": "eval_accuracy"},
            "best_metric, load_best_model_at_end: there",
        ),
        ({"eval_batch_size": 4, "lowest_is_best": False}, "eval_batch_size, lowest_is_best: there"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 goes with a DataConfig"),
    ],
)
def test_arguments_that_would_have_no_effect(fields, message):
    with pytest.raises(ValueError, match=message):
        check_run(TrainingArguments("out", **fields), [], None, None)


def test_data_and_arguments_that_do_not_fit():
    data, mesh = DataConfig("a.txt"), create_mesh((1, 8, 1, 1, 1))
    with pytest.raises(ValueError, match="epochs=3 and num_train_epochs=2 say the same"):
        check_run(TrainingArguments("out", num_train_epochs=2), DataConfig("a.txt", epochs=3), None, None)
    with pytest.raises(ShardingError, match="4 rows cannot be split over 8 devices"):
        check_run(TrainingArguments("out", batch_size=4), data, None, mesh)
    with pytest.raises(ShardingError, match="12 rows cannot be split over 8 devices"):
        check_run(TrainingArguments("out", eval_batch_size=12), data, data, mesh)
    check_run(TrainingArguments("out", batch_size=16), data, data, mesh)


def test_a_batch_is_a_mapping_with_labels():
    with pytest.raises(TypeError, match="must be a mapping of arrays by name, got list"):
        check_batch([1])
    with pytest.raises(ValueError, match="needs 'labels' to learn from, got input_ids"):
        check_batch({"input_ids": 1})


def test_no_field_is_declared_and_never_read():
    """That each does what it says is in test_optimizers, test_trainer and test_elarge."""
    folder = Path(easydel.training.__file__).parent
    files = [file for file in folder.rglob("*.py") if file.name not in ("arguments.py", "elarge.py", "checks.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    for field in dataclasses.fields(TrainingArguments):
        assert re.search(rf"\barguments\.{field.name}\b", code), field.name
