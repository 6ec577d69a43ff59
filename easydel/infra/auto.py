"""Classes that choose a family by the checkpoint's `model_type`."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from easydel.hub.resolve import resolve_checkpoint
from easydel.infra.pretrained import load_config
from easydel.infra.registry import TaskType, get_config_class, get_module_class
from easydel.sharding import PartitionRules

_HUB_KEYWORDS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


class AutoEasyDeLConfig:
    """Loads the config of any known `model_type`."""

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not built directly: use from_pretrained() or for_model()")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a config from a directory or Hub id; keywords select a revision etc. or override fields.

        Raises:
            UnsupportedError: an unknown `model_type`; it is named and the known ones are listed.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_KEYWORDS if name in kwargs}
        return load_config(resolve_checkpoint(pretrained_model_name_or_path, **hub), None, kwargs)

    @classmethod
    def for_model(cls, model_type: str, **fields: Any) -> Any:
        """Make a config of a `model_type`."""
        return get_config_class(model_type)(**fields)


class AutoEasyDeLModel:
    """Loads the backbone of any known `model_type`."""

    task: ClassVar[TaskType] = TaskType.BASE

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not built directly: use from_pretrained() or from_config()")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model from a directory or Hub id; keywords as in `EasyDeLBaseModule.from_pretrained`.

        Raises:
            UnsupportedError: an unknown `model_type`, or one that does not offer this task.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_KEYWORDS if name in kwargs}
        directory = resolve_checkpoint(pretrained_model_name_or_path, **hub)
        config = kwargs.get("config")
        model_type = (load_config(directory, None, {}) if config is None else config).model_type
        return get_module_class(cls.task, model_type).from_pretrained(directory, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Build a freshly initialised model; keywords as in the model's `__init__`."""
        return get_module_class(cls.task, config.model_type)(config, **kwargs)

    @classmethod
    def lazy_init(cls, config: Any, mesh: Any = None, rules: PartitionRules | None = None, **options: Any) -> Any:
        """Build a model of shapes and shardings only; arguments as of `EasyDeLBaseModule.lazy_init`."""
        return get_module_class(cls.task, config.model_type).lazy_init(config, mesh, rules, **options)

    @classmethod
    def sharded_init(cls, config: Any, mesh: Any = None, rules: PartitionRules | None = None, **options: Any) -> Any:
        """Build a freshly initialised model on its mesh; arguments as of `EasyDeLBaseModule.sharded_init`."""
        return get_module_class(cls.task, config.model_type).sharded_init(config, mesh, rules, **options)


class AutoEasyDeLModelForCausalLM(AutoEasyDeLModel):
    """Loads the causal language model of any known `model_type`."""

    task = TaskType.CAUSAL_LM


class AutoEasyDeLModelForSequenceClassification(AutoEasyDeLModel):
    """Loads the sequence classifier of any known `model_type`."""

    task = TaskType.SEQUENCE_CLASSIFICATION


class AutoEasyDeLModelForSeq2SeqLM(AutoEasyDeLModel):
    """Loads the encoder-decoder language model of any known `model_type`."""

    task = TaskType.SEQ2SEQ


class AutoEasyDeLModelForMaskedLM(AutoEasyDeLModel):
    """Loads the masked language model of any known `model_type`."""

    task = TaskType.MASKED_LM


class AutoEasyDeLModelForTokenClassification(AutoEasyDeLModel):
    """Loads the token classifier of any known `model_type`."""

    task = TaskType.TOKEN_CLASSIFICATION


class AutoEasyDeLModelForQuestionAnswering(AutoEasyDeLModel):
    """Loads the extractive question answerer of any known `model_type`."""

    task = TaskType.QUESTION_ANSWERING


class AutoEasyDeLModelForEmbedding(AutoEasyDeLModel):
    """Loads the embedding model of any known `model_type`."""

    task = TaskType.EMBEDDING
