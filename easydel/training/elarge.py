"""`eLargeModel`: model, mesh, data, optimizer and run in one mapping, such as a YAML file holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import jax

from easydel.fields import read_fields, unknown_field
from easydel.lora import LoraConfig
from easydel.loss import LossConfig
from easydel.sharding import AXIS_NAMES, create_mesh
from easydel.training.arguments import TrainingArguments
from easydel.training.data import DataConfig
from easydel.training.model_section import ModelSection, QuantizationSection
from easydel.training.trainer import Trainer, TrainingResult
from easydel.training.yaml_files import read_yaml

ARGUMENTS: dict[str, dict[str, str]] = {
    "optimizer": {
        "name": "optimizer", "learning_rate": "learning_rate", "weight_decay": "weight_decay", "beta1": "adam_beta1",
        "beta2": "adam_beta2", "epsilon": "adam_epsilon", "momentum": "momentum", "max_grad_norm": "max_grad_norm",
    },
    "schedule": {
        "name": "schedule", "warmup_steps": "warmup_steps", "warmup_ratio": "warmup_ratio",
        "decay_ratio": "decay_ratio", "min_learning_rate_ratio": "min_learning_rate_ratio",
    },
    "logging": {"to": "log_to", "steps": "log_steps"},
}  # fmt: skip
"""Sections whose names stand for fields of `TrainingArguments`; the section `training` has the other fields' names."""
SECTIONS = ("model", "quantization", "lora", "mesh", "data", "loss", "training", *ARGUMENTS)
SIDES = ("train", "eval")
"""Of the section `data`."""


class eLargeModel:
    """A whole run as one object.

    Args:
        config: sections by name: `model`, `quantization`, `lora`, `mesh`, `data`, `loss`, `optimizer`, `schedule`,
            `training`, `logging`; see `docs/elarge_model.md`.

    Raises:
        ValueError: an unknown section or field (the nearest is named), or a value of the wrong type or range.
        UnsupportedError: a model, a task or a precision that is not offered.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        problems = [unknown_field("the configuration", n, SECTIONS) for n in config if n not in SECTIONS]
        for name, section in config.items():
            if name in SECTIONS and not isinstance(section, Mapping | None):
                problems.append(f"{name}: expected a mapping, got {section!r}")
        if problems:
            raise ValueError("\n".join(problems))
        self.config = {name: dict(section) for name, section in config.items() if section is not None}
        self.model_section, self.quantization, self.lora, self.arguments, data, self._mesh = _all_of(
            lambda: ModelSection(**read_fields(ModelSection, self.config.get("model", {}), "model")),
            lambda: self._optional("quantization", QuantizationSection),
            lambda: self._optional("lora", LoraConfig),
            lambda: _arguments(self.config),
            lambda: _data(self.config.get("data", {})),
            lambda: _mesh(self.config.get("mesh", {})),
        )
        self.train_data, self.eval_data = data

    def _optional(self, name: str, section: type) -> Any:
        """Read a section without which nothing of its kind is done; an empty one means all defaults."""
        if name not in self.config:
            return None
        read = read_fields(section, self.config[name], name)
        try:
            return section(**read)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @classmethod
    def from_yaml(cls, file: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file; `overrides` sets values by dotted name, such as `{"training.max_steps": 10}`.

        Raises:
            ValueError: the file is no YAML mapping; else as the constructor.
        """
        content = read_yaml(Path(file).read_text(encoding="utf-8"), str(file))
        if not isinstance(content, dict):
            raise ValueError(f"{file}: expected a mapping of sections ({', '.join(SECTIONS)}), got {content!r}")
        for name, value in (overrides or {}).items():
            *sections, last = name.split(".")
            target = content
            for section in sections:
                if target.get(section) is None:
                    target[section] = {}
                target = target[section]
                if not isinstance(target, dict):
                    raise ValueError(f"{name}: {section} is no section but {target!r}")
            target[last] = value
        return cls(content)

    # ------------------------------------------------------------------ parts
    def build_model(self) -> Any:
        """Load or make the model, on its mesh if there are several devices, quantized and with adapters if asked for.

        See `ModelSection.build`.
        """
        return self.model_section.build(self.build_mesh(), self.quantization, self.lora)

    def build_mesh(self) -> Any:
        """Return the mesh, `None` for a single device."""
        if not self._mesh:
            return create_mesh() if jax.device_count() > 1 else None
        return create_mesh(**self._mesh)

    def build_tokenizer(self) -> Any:
        """Load the tokenizer; see `ModelSection.build_tokenizer`."""
        return self.model_section.build_tokenizer()

    def build_trainer(self, **options: Any) -> Trainer:
        """Make the trainer; `options` go to `Trainer` (callbacks, logs).

        Raises:
            ValueError: there are no training data.
        """
        if self.train_data is None:
            raise ValueError("data.train: name the data to train on, such as data: {train: {path: texts/*.txt}}")
        tokenizer = self.build_tokenizer()
        return Trainer(
            self.build_model(), self.arguments, self.train_data, self.eval_data, tokenizer=tokenizer, keep_model=False,
            **options,
        )  # fmt: skip

    def train(self, **options: Any) -> TrainingResult:
        """Load everything and train; see `Trainer.train`."""
        return self.build_trainer(**options).train()


def _all_of(*parts: Callable[[], Any]) -> list[Any]:
    """Return what the parts make; what is wrong with any is told together."""
    made, errors = [], []
    for part in parts:
        try:
            made.append(part())
        except ValueError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ValueError("\n".join(map(str, errors)))
    return made


def _arguments(config: Mapping[str, Any]) -> TrainingArguments:
    names = {"training": {field.name: field.name for field in fields(TrainingArguments)}, **ARGUMENTS}

    def read(section: str) -> dict[str, Any]:
        if section != "loss":
            return read_fields(TrainingArguments, config.get(section, {}), section, names[section])
        return {"loss_config": LossConfig(**read_fields(LossConfig, config["loss"], "loss"))}

    sections = [*names, "loss"] if "loss" in config else [*names]
    values: dict[str, Any] = {}
    for section, part in zip(sections, _all_of(*(functools.partial(read, name) for name in sections)), strict=True):
        if twice := sorted(values.keys() & part.keys()):
            raise ValueError(f"{section} and training.{', training.'.join(twice)} say the same thing; leave one out")
        values |= part
    if "output_dir" not in values:
        raise ValueError("training.output_dir: name a folder for checkpoints, logs and the finished model")
    return TrainingArguments(**values)


def _data(section: Mapping[str, Any]) -> tuple[DataConfig | None, DataConfig | None]:
    """Return the data of training and evaluation; what stands beside `train` and `eval` holds for both."""
    known = [field.name for field in fields(DataConfig)]
    problems = [unknown_field("data", n, (*SIDES, *known)) for n in section if n not in (*SIDES, *known)]
    if problems:
        raise ValueError("\n".join(problems))
    shared = {name: value for name, value in section.items() if name not in SIDES}
    return _data_of("train", section.get("train"), shared), _data_of("eval", section.get("eval"), shared)


def _data_of(side: str, own: Any, shared: Mapping[str, Any]) -> DataConfig | None:
    if own is None:
        return None
    if isinstance(own, str | list):
        own = {"path": own}
    if not isinstance(own, Mapping):
        raise ValueError(f"data.{side}: expected a mapping, a file or a list of files, got {own!r}")
    read = read_fields(DataConfig, {**shared, **own}, f"data.{side}")
    try:
        return DataConfig(**read)
    except ValueError as error:
        raise ValueError(f"data.{side}: {error}") from error


def _mesh(section: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the arguments of `create_mesh`."""
    dims = {name: size for name, size in section.items() if name != "dcn"}
    over = section.get("dcn", {})
    if not isinstance(over, Mapping):
        raise ValueError(f"mesh.dcn: expected a mapping of axes to numbers of groups, got {over!r}")
    problems = [unknown_field("mesh", name, (*AXIS_NAMES, "dcn")) for name in dims if name not in AXIS_NAMES]
    problems += [unknown_field("mesh.dcn", name, AXIS_NAMES) for name in over if name not in AXIS_NAMES]
    for where, what, sizes in (("mesh", "devices", dims), ("mesh.dcn", "groups of devices", over)):
        problems += [
            f"{where}.{name}: expected a number of {what} (one axis may be -1), got {size!r}"
            for name, size in sizes.items()
            if not isinstance(size, int) or isinstance(size, bool)
        ]
    if problems:
        raise ValueError("\n".join(problems))
    found = {"axis_dims": tuple(dims.get(name, 1) for name in AXIS_NAMES)} if dims else {}
    return found | ({"dcn_axis_dims": tuple(over.get(name, 1) for name in AXIS_NAMES)} if over else {})
