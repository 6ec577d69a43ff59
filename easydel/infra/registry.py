"""Which class serves which task for which `model_type`.

`FAMILIES` is the one table of names: families are imported when one of their names is asked for.
Classes registered by users stand beside them with the same rights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

from easydel.errors import UnsupportedError
from easydel.paths import nearest

T = TypeVar("T", bound=Any)


class TaskType(StrEnum):
    """What a model is for; the values are `model.model_task`."""

    BASE = "base"
    CAUSAL_LM = "causal-lm"
    SEQ2SEQ = "seq2seq"
    MASKED_LM = "masked-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    EMBEDDING = "embedding"
    IMAGE_TEXT_TO_TEXT = "image-text-to-text"
    IMAGE_CLASSIFICATION = "image-classification"
    SPEECH_SEQ2SEQ = "speech-seq2seq"


SUFFIXES: dict[TaskType, str] = {
    TaskType.BASE: "Model",
    TaskType.CAUSAL_LM: "ForCausalLM",
    TaskType.SEQ2SEQ: "ForConditionalGeneration",
    TaskType.MASKED_LM: "ForMaskedLM",
    TaskType.SEQUENCE_CLASSIFICATION: "ForSequenceClassification",
    TaskType.TOKEN_CLASSIFICATION: "ForTokenClassification",
    TaskType.QUESTION_ANSWERING: "ForQuestionAnswering",
    TaskType.EMBEDDING: "ForEmbedding",
}

# model_type -> (module, class name prefix, tasks). Class names follow transformers: prefix + suffix of the task.
_DECODER = (TaskType.BASE, TaskType.CAUSAL_LM, TaskType.SEQUENCE_CLASSIFICATION)
_TAGGER = (*_DECODER, TaskType.TOKEN_CLASSIFICATION)
_ENCODER = (
    TaskType.BASE,
    TaskType.MASKED_LM,
    TaskType.SEQUENCE_CLASSIFICATION,
    TaskType.TOKEN_CLASSIFICATION,
    TaskType.QUESTION_ANSWERING,
    TaskType.EMBEDDING,
)
FAMILIES: dict[str, tuple[str, str, tuple[TaskType, ...]]] = {
    "bamba": ("easydel.models.bamba", "Bamba", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "bart": (
        "easydel.models.bart",
        "Bart",
        (TaskType.BASE, TaskType.SEQ2SEQ, TaskType.SEQUENCE_CLASSIFICATION, TaskType.QUESTION_ANSWERING),
    ),
    "bert": ("easydel.models.bert", "Bert", _ENCODER),
    "bloom": ("easydel.models.bloom", "Bloom", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "cohere": ("easydel.models.cohere", "Cohere", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "cohere2": ("easydel.models.cohere2", "Cohere2", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "deepseek_v2": ("easydel.models.deepseek_v2", "DeepseekV2", _DECODER),
    "deepseek_v3": ("easydel.models.deepseek_v3", "DeepseekV3", _TAGGER),
    "distilbert": ("easydel.models.distilbert", "DistilBert", _ENCODER),
    "ernie4_5": ("easydel.models.ernie4_5", "Ernie4_5", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "exaone4": ("easydel.models.exaone4", "Exaone4", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "falcon": ("easydel.models.falcon", "Falcon", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "falcon_h1": ("easydel.models.falcon_h1", "FalconH1", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "falcon_mamba": ("easydel.models.falcon_mamba", "FalconMamba", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "gemma": ("easydel.models.gemma", "Gemma", _TAGGER),
    "gemma2": ("easydel.models.gemma2", "Gemma2", _DECODER),
    "gemma3_text": ("easydel.models.gemma3", "Gemma3Text", _DECODER),
    "glm": ("easydel.models.glm", "Glm", _TAGGER),
    "glm4": ("easydel.models.glm4", "Glm4", _TAGGER),
    "glm4_moe": ("easydel.models.glm4_moe", "Glm4Moe", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "gpt2": ("easydel.models.gpt2", "GPT2", _TAGGER),
    "gpt_neox": ("easydel.models.gpt_neox", "GPTNeoX", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "gpt_oss": ("easydel.models.gpt_oss", "GptOss", _TAGGER),
    "gptj": ("easydel.models.gptj", "GPTJ", (*_DECODER, TaskType.QUESTION_ANSWERING)),
    "granite": ("easydel.models.granite", "Granite", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "granitemoe": ("easydel.models.granitemoe", "GraniteMoe", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "helium": ("easydel.models.helium", "Helium", _TAGGER),
    "jamba": ("easydel.models.jamba", "Jamba", _DECODER),
    "llama": ("easydel.models.llama", "Llama", _DECODER),
    "mamba": ("easydel.models.mamba", "Mamba", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "mamba2": ("easydel.models.mamba2", "Mamba2", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "mistral": ("easydel.models.mistral", "Mistral", _DECODER),
    "mixtral": ("easydel.models.mixtral", "Mixtral", _DECODER),
    "modernbert": ("easydel.models.modernbert", "ModernBert", _ENCODER),
    "nemotron": ("easydel.models.nemotron", "Nemotron", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "olmo": ("easydel.models.olmo", "Olmo", _DECODER),
    "olmo2": ("easydel.models.olmo2", "Olmo2", _DECODER),
    "olmo3": ("easydel.models.olmo3", "Olmo3", _DECODER),
    "olmoe": ("easydel.models.olmoe", "Olmoe", (TaskType.BASE, TaskType.CAUSAL_LM)),
    "opt": ("easydel.models.opt", "OPT", (*_DECODER, TaskType.QUESTION_ANSWERING)),
    "phi": ("easydel.models.phi", "Phi", _TAGGER),
    "phi3": ("easydel.models.phi3", "Phi3", _TAGGER),
    "phimoe": ("easydel.models.phimoe", "Phimoe", _DECODER),
    "qwen2": ("easydel.models.qwen2", "Qwen2", _DECODER),
    "qwen2_moe": ("easydel.models.qwen2_moe", "Qwen2Moe", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "qwen3": ("easydel.models.qwen3", "Qwen3", _DECODER),
    "qwen3_moe": ("easydel.models.qwen3_moe", "Qwen3Moe", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "qwen3_next": ("easydel.models.qwen3_next", "Qwen3Next", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "roberta": ("easydel.models.roberta", "Roberta", _ENCODER),
    "seed_oss": ("easydel.models.seed_oss", "SeedOss", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "smollm3": ("easydel.models.smollm3", "SmolLM3", (*_TAGGER, TaskType.QUESTION_ANSWERING)),
    "stablelm": ("easydel.models.stablelm", "StableLm", _TAGGER),
    "starcoder2": ("easydel.models.starcoder2", "Starcoder2", _TAGGER),
    "t5": ("easydel.models.t5", "T5", (TaskType.BASE, TaskType.SEQ2SEQ)),
}

# Where transformers' class name is not prefix + suffix of the task.
OTHER_NAMES: dict[tuple[str, TaskType], str] = {
    ("gemma3_text", TaskType.CAUSAL_LM): "Gemma3ForCausalLM",
    ("gpt2", TaskType.CAUSAL_LM): "GPT2LMHeadModel",
}

_CONFIGS: dict[str, type] = {}
_MODULES: dict[tuple[TaskType, str], type] = {}


def family_names() -> dict[str, str]:
    """Return every public name of the built-in families (configs and classes) → the module that defines it."""
    names = {}
    for family, (module, prefix, tasks) in FAMILIES.items():
        names[f"{prefix}Config"] = module
        names |= {OTHER_NAMES.get((family, task), prefix + SUFFIXES[task]): module for task in tasks}
    return names


def _load_family(model_type: str) -> None:
    if model_type in FAMILIES and model_type not in _CONFIGS:
        importlib.import_module(FAMILIES[model_type][0])


def register_config(model_type: str) -> Callable[[T], T]:
    """Class decorator: make a config class known under `model_type`.

    Raises:
        ValueError: another class is registered under this name, or the class says it is another `model_type`.
    """

    def register(config: T) -> T:
        family, prefix, _ = FAMILIES.get(model_type, (config.__module__, "", ()))
        if config.__module__ != family:  # a built-in name is taken even if nobody has asked for it yet
            raise ValueError(f"model_type {model_type!r} is already taken by {family}.{prefix}Config")
        _check_free(_CONFIGS.get(model_type), config, f"model_type {model_type!r}")
        if getattr(config, "model_type", "") not in ("", model_type):
            raise ValueError(
                f"{config.__name__}.model_type is {config.model_type!r}, but is registered as {model_type!r}"
            )
        config.model_type = model_type
        _CONFIGS[model_type] = config
        return config

    return register


def register_module(task: TaskType | str, config: type, model_type: str | None = None) -> Callable[[T], T]:
    """Class decorator: make a module the one that serves `task` for `model_type`.

    Args:
        task: a `TaskType` or its value, such as `"causal-lm"`.
        config: the config class; it becomes the module's `config_class` (and is registered if it is not yet).
        model_type: defaults to `config.model_type`.

    Raises:
        ValueError: no `model_type`, an unknown task, or the place is taken by another class.
    """
    task = as_task(task)
    name = model_type or getattr(config, "model_type", "")
    if not name:
        raise ValueError(f"{config.__name__} has no model_type: give it one, or pass model_type=")
    if name not in _CONFIGS:
        register_config(name)(config)

    def register(module: T) -> T:
        _check_free(_MODULES.get((task, name)), module, f"task {task.value!r} of model_type {name!r}")
        module.config_class, module.model_task, module.model_type = config, task.value, name
        _MODULES[task, name] = module
        return module

    return register


def _check_free(taken: type | None, cls: type, place: str) -> None:
    # The same definition executed again (a reloaded module, a notebook cell) takes its own place back.
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{place} is already taken by {taken.__module__}.{taken.__qualname__}")


def as_task(task: TaskType | str) -> TaskType:
    """Return the `TaskType` of a value.

    Raises:
        ValueError: there is no such task; the known ones are listed.
    """
    try:
        return TaskType(task)
    except ValueError:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(t.value for t in TaskType)}") from None


def get_config_class(model_type: str) -> type:
    """Return the config class of a `model_type`.

    Raises:
        UnsupportedError: unknown; names it and lists the known ones.
    """
    _load_family(model_type)
    if model_type not in _CONFIGS:
        raise UnsupportedError(_unknown(f"model_type {model_type!r}", model_type, sorted({*FAMILIES, *_CONFIGS})))
    return _CONFIGS[model_type]


def get_module_class(task: TaskType | str, model_type: str) -> type[Any]:
    """Return the class that serves `task` for `model_type`.

    Raises:
        UnsupportedError: unknown `model_type`, or it does not offer the task; what is known is listed.
    """
    task = as_task(task)
    offered = [offer.value for offer in offered_tasks(model_type)]
    if (task, model_type) not in _MODULES:
        raise UnsupportedError(_unknown(f"task {task.value!r} of model_type {model_type!r}", task.value, offered))
    return _MODULES[task, model_type]


def offered_tasks(model_type: str) -> list[TaskType]:
    """Return the tasks for which a `model_type` has a class.

    Raises:
        UnsupportedError: unknown; names it and lists the known ones.
    """
    get_config_class(model_type)
    return sorted(task for task, name in _MODULES if name == model_type)


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = nearest(name, known)
    return (
        f"{what} is not supported{f' (did you mean {near[0]!r}?)' if near else ''}; known: {', '.join(known) or 'none'}"
    )
