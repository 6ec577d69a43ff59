"""Which classes are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easydel.errors import CheckpointError, UnsupportedError
from easydel.infra.pretrained import CONFIG, QUANTIZATION, load_config, read_json
from easydel.infra.registry import TaskType, get_module_class, offered_tasks


@dataclass(frozen=True)
class Choice:
    """The class of a checkpoint, here and in transformers.

    Attributes:
        ours: the class here.
        theirs: transformers' class of the same name.
        config: the checkpoint's, as it is read here.
    """

    ours: Any
    theirs: Any
    config: Any


def choose_classes(directory: Path, task: TaskType | str | None) -> Choice:
    """Return the classes for a task; `None`: those that `architectures` of the checkpoint's config names.

    Raises:
        CheckpointError: the config does not load.
        UnsupportedError: nobody registered its `model_type`, or not for this task; transformers has no such class; the
            checkpoint is quantized.
        ValueError: no task is given and `architectures` names no class of ours.
    """
    import transformers

    config = load_config(directory, None, {})
    if read_json(directory / CONFIG).get(QUANTIZATION) is not None:
        raise UnsupportedError(
            f"{directory / CONFIG}: the checkpoint is quantized, which is not supported here: the two libraries round "
            "differently; compare the checkpoint that it was made from"
        )
    ours = _named_class(config, directory) if task is None else get_module_class(task, config.model_type)
    theirs = getattr(transformers, ours.__name__, None)
    if theirs is None:
        raise UnsupportedError(
            f"comparing {ours.__name__} is not supported: transformers {transformers.__version__} has no class of that "
            f"name; other tasks of {config.model_type!r}: {_listed(config.model_type)}"
        )
    return Choice(ours, theirs, config)


def _named_class(config: Any, directory: Path) -> Any:
    named = list(getattr(config, "architectures", None) or [])
    classes = {cls.__name__: cls for task in offered_tasks(config.model_type) if (cls := _class(task, config))}
    for name in named:
        if name in classes:
            return classes[name]
    raise CheckpointError(
        f"{directory / CONFIG}: architectures {named} names none of our classes for {config.model_type!r} "
        f"({', '.join(classes)}); choose a task: {_listed(config.model_type)}"
    )


def _class(task: TaskType, config: Any) -> Any:
    return get_module_class(task, config.model_type)


def _listed(model_type: str) -> str:
    return ", ".join(task.value for task in offered_tasks(model_type))
