"""Which model a run trains: loaded or fresh, on a mesh, with its tokenizer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from easydel.errors import UnsupportedError
from easydel.hub.tokenizer import load_tokenizer
from easydel.lora import DEFAULT, LoraConfig
from easydel.quantization.methods import check_group_size, method_named

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class QuantizationSection:
    """How the weights are quantized.

    Attributes:
        method: `"nf4"`, `"8bit"`, `"a8bit"`, `"a8q"` or `"a4q"`.
        group_size: inputs that share a scale.
        pattern: regular expression on module paths.

    Raises:
        ValueError: an unknown method, or a group size that is no positive integer.
    """

    method: str = "nf4"
    group_size: int = 64
    pattern: str = ".*"

    def __post_init__(self) -> None:
        method_named(self.method)
        check_group_size(self.group_size)

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that say the same."""
        return {f"quantization_{each.name}": getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class ModelSection:
    """Which model.

    Attributes:
        name_or_path: directory or Hub id to load from, or `stdlib-4m`, the model that this package carries; `None`: a
            fresh model of `model_type`.
        model_type: of a fresh model, such as `"llama"`.
        task: `"causal-lm"` or another task that the family offers.
        dtype: computations are done in it.
        param_dtype: parameters are stored, and updated, in it.
        tokenizer: directory, Hub id or `stdlib-4m`; `None`: the model's.
        revision: branch, tag or commit on the Hub, of the model and its own tokenizer.
        config: fields of the model's config to set, such as `gradient_checkpointing: full`.
        seed: of what is not loaded: a fresh model, or a new head.
        allow_new: patterns of parameters that a checkpoint may lack, such as a new head's.

    Raises:
        ValueError: not exactly one of `name_or_path` and `model_type` is given, or a field is of the other one's.
        UnsupportedError: an unknown dtype.
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
        for name in ("dtype", "param_dtype"):
            if (value := getattr(self, name)) not in DTYPES:
                raise UnsupportedError(f"model.{name}={value!r} is not supported; choose one of {', '.join(DTYPES)}")
        for name in ("revision", "allow_new"):
            if self.model_type is not None and getattr(self, name):
                raise ValueError(f"model.{name} is of a model that is loaded (name_or_path), not of a fresh one")

    @property
    def source(self) -> str | None:
        """Where the model is loaded from; `None` for a fresh one."""
        return None if self.name_or_path is None else _place(self.name_or_path)

    def build(self, mesh: Any, quantization: QuantizationSection | None = None, lora: LoraConfig | None = None) -> Any:
        """Load or make the model, quantize it, give it adapters.

        Args:
            mesh: where its parameters lie; `None`: on a single device.
            quantization: of its weights, of a loaded model while they are read.
            lora: of its adapters.

        Raises:
            CheckpointError: it cannot be loaded.
            ShardingError: the mesh does not fit the rules.
            ValueError: `config` has a field that the model's config has not.
            UnsupportedError: an unknown model type, or a task that it does not offer.
        """
        from flax import nnx

        from easydel.infra.registry import get_module_class

        config = self._model_config()
        made = get_module_class(self.task, config.model_type)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": nnx.Rngs(self.seed)}
        if self.source is not None:
            loading = {"mesh": mesh, "revision": self.revision, "allow_new": self.allow_new}
            loading |= {} if quantization is None else quantization.loading()
            model = made.from_pretrained(self.source, **loading, **options, **self.config)
        else:
            model = made(config, **options) if mesh is None else made.sharded_init(config, mesh, **options)
            if quantization is not None:
                model.quantize(quantization.method, quantization.group_size, quantization.pattern)
        return model if lora is None else model.add_adapter(DEFAULT, lora, rngs=nnx.Rngs(self.seed))

    def _model_config(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError

        from easydel.infra.auto import AutoEasyDeLConfig
        from easydel.infra.base_module import EasyDeLBaseModule
        from easydel.infra.registry import get_config_class

        taken = {
            *inspect.signature(EasyDeLBaseModule.from_pretrained).parameters,
            *(each.name for each in fields(self)),
        }
        if clash := sorted(taken & self.config.keys()):
            raise ValueError(f"model.config: {', '.join(clash)} is no field of a model's config; see the sections' own")
        try:
            if self.source is not None:
                return AutoEasyDeLConfig.from_pretrained(self.source, revision=self.revision, **self.config)
            config_class: Any = get_config_class(str(self.model_type))
            config, unused = config_class.from_dict({}, return_unused_kwargs=True, **self.config)
        except (TypeError, StrictDataclassError) as error:  # an unknown field, or a value of the wrong type
            raise ValueError(f"model.config: {error}") from error
        if unused:
            raise ValueError(f"model.config: {config_class.__name__} has no field {', '.join(map(repr, unused))}")
        return config

    def build_tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            ValueError: a fresh model has none, or there is none.
        """
        if self.tokenizer is not None:
            return load_tokenizer(_place(self.tokenizer))
        if self.source is None:
            raise ValueError("model.tokenizer: a fresh model has no tokenizer of its own; name one")
        return load_tokenizer(self.source, self.revision)


def _place(name: str) -> str:
    """Return a directory or Hub id; the embedded model's name is that of its directory, unless there is one here."""
    from easydel.assets import embedded_model_path

    embedded = embedded_model_path()
    return str(embedded) if name == embedded.name and not Path(name).exists() else name
