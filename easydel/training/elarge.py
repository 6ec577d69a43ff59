"""`eLargeModel`: model, mesh, data, optimizer and run in one mapping, such as a YAML file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax

from easydel.errors import UnsupportedError
from easydel.hub.tokenizer import load_tokenizer
from easydel.sharding import AXIS_NAMES, create_mesh
from easydel.training.arguments import TrainingArguments
from easydel.training.data import DataConfig
from easydel.training.fields import read_fields, unknown_field
from easydel.training.trainer import Trainer, TrainingResult

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
SECTIONS = ("model", "mesh", "data", "loss", "training", *ARGUMENTS)
LATER = ("quantization", "lora")


@dataclass(frozen=True)
class ModelSection:
    """Which model.

    Attributes:
        name_or_path: directory or Hub id to load from; `None`: a fresh model of `model_type`.
        model_type: of a fresh model, such as `"llama"`.
        task: `"causal-lm"` or another task that the family offers.
        dtype: computations are done in it.
        param_dtype: parameters are stored, and updated, in it.
        tokenizer: directory or Hub id; `None`: the model's.
        revision: branch, tag or commit on the Hub.
        config: fields of the model's config to set, such as `gradient_checkpointing: full`.
        seed: of a fresh model.
        allow_new: patterns of parameters that a checkpoint may lack, such as a new head's.
    """

    name_or_path: str | None = None
    model_type: str | None = None
    task: str = "causal-lm"
    dtype: str = "float32"
    param_dtype: str = "float32"
    tokenizer: str | None = None
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    allow_new: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.model_type is None):
            raise ValueError("model: give name_or_path (to load a model) or model_type (to make a fresh one), not both")


class eLargeModel:
    """A whole run as one object.

    Args:
        config: sections by name: `model`, `mesh`, `data`, `loss`, `optimizer`, `schedule`, `training`, `logging`; see
            `docs/elarge_model.md`.

    Raises:
        ValueError: an unknown section or field (the nearest is named), or a value of the wrong type or range.
        UnsupportedError: a section that is not offered yet.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        unknown = [name for name in config if name not in (*SECTIONS, *LATER)]
        problems = [unknown_field("the configuration", name, SECTIONS) for name in unknown]
        if problems:
            raise ValueError("\n".join(problems))
        for name in LATER:
            if config.get(name):
                raise UnsupportedError(f"the section {name!r} is not supported yet; leave it out")
        self.config = {name: _section(config, name) for name in config if name not in LATER}
        self.model_section = ModelSection(**read_fields(ModelSection, self.config.get("model", {}), "model"))
        self.arguments = _arguments(self.config)
        self.train_data, self.eval_data = _data(self.config.get("data", {}))
        self._mesh_dims = _mesh(self.config.get("mesh"))

    @classmethod
    def from_yaml(cls, file: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file; `overrides` sets values by dotted name, such as `{"training.max_steps": 10}`.

        Raises:
            ValueError: the file is no YAML mapping; else as the constructor.
        """
        import yaml

        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: expected a mapping of sections ({', '.join(SECTIONS)}), got {content!r}")
        for name, value in (overrides or {}).items():
            *sections, last = name.split(".")
            target = content
            for section in sections:
                target = target.setdefault(section, {})
                if not isinstance(target, dict):
                    raise ValueError(f"{name}: {section} is no section")
            target[last] = value
        return cls(content)

    # ------------------------------------------------------------------ parts
    def build_model(self) -> Any:
        """Load or make the model, on its mesh if there are several devices.

        Raises:
            CheckpointError: it cannot be loaded.
            ShardingError: the mesh does not fit the devices or the rules.
        """
        from flax import nnx

        from easydel.infra.auto import AutoEasyDeLConfig
        from easydel.infra.registry import get_config_class, get_module_class

        section, mesh = self.model_section, self.build_mesh()
        options = {"dtype": section.dtype, "param_dtype": section.param_dtype}
        if section.name_or_path is None:
            config = get_config_class(str(section.model_type))(**section.config)
            made = get_module_class(section.task, str(section.model_type))
            rngs = nnx.Rngs(section.seed)
            if mesh is None:
                return made(config, **options, rngs=rngs)
            return made.sharded_init(config, mesh, rngs=rngs, **options)
        source = str(self.source)
        model_type = AutoEasyDeLConfig.from_pretrained(source, revision=section.revision).model_type
        return get_module_class(section.task, model_type).from_pretrained(
            source,
            mesh=mesh,
            revision=section.revision,
            allow_new=section.allow_new,
            rngs=nnx.Rngs(section.seed),
            **options,
            **section.config,
        )

    @property
    def source(self) -> str | None:
        """Where the model is loaded from; `stdlib-4m` is the one that this package carries."""
        from easydel.assets import embedded_model_path

        name = self.model_section.name_or_path
        if name == embedded_model_path().name and not Path(name).exists():
            return str(embedded_model_path())
        return name

    def build_mesh(self) -> Any:
        """Return the mesh, `None` for a single device."""
        if self._mesh_dims is None:
            return create_mesh() if jax.device_count() > 1 else None
        return create_mesh(self._mesh_dims)

    def build_tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            ValueError: a fresh model has none.
        """
        name = self.model_section.tokenizer or self.source
        if name is None:
            raise ValueError("model.tokenizer: a fresh model has no tokenizer of its own; name one")
        return load_tokenizer(name)

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


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config[name]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected a mapping, got {value!r}")
    return dict(value)


def _arguments(config: Mapping[str, Any]) -> TrainingArguments:
    values = dict(config.get("training", {}))
    for name, names in ARGUMENTS.items():
        for key, value in config.get(name, {}).items():
            if key not in names:
                raise ValueError(unknown_field(name, key, names))
            if names[key] in config.get("training", {}):
                raise ValueError(f"{name}.{key} and training.{names[key]} say the same thing; leave one out")
            values[names[key]] = value
    if "loss" in config:
        values["loss_config"] = config["loss"]
    if "output_dir" not in values:
        raise ValueError("training.output_dir: name a folder for checkpoints, logs and the finished model")
    return TrainingArguments.from_dict(values)


def _data(section: Mapping[str, Any]) -> tuple[DataConfig | None, DataConfig | None]:
    """Return the data of training and evaluation; what stands beside `train` and `eval` holds for both."""
    shared = {name: value for name, value in section.items() if name not in ("train", "eval")}
    made: list[DataConfig | None] = []
    for side in ("train", "eval"):
        own = section.get(side)
        if own is None:
            made.append(None)
            continue
        values = shared | ({"path": own} if isinstance(own, str | list) else dict(own))
        made.append(DataConfig(**read_fields(DataConfig, values, f"data.{side}")))
    return made[0], made[1]


def _mesh(section: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    if not section:
        return None
    for name, size in section.items():
        if name not in AXIS_NAMES:
            raise ValueError(unknown_field("mesh", name, AXIS_NAMES))
        if not isinstance(size, int) or isinstance(size, bool):
            raise ValueError(f"mesh.{name}: expected a number of devices (one axis may be -1), got {size!r}")
    return tuple(section.get(name, 1) for name in AXIS_NAMES)
