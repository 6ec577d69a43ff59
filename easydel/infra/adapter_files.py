"""PEFT adapters into a model and out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from easydel.calls import refuse_shapes
from easydel.infra import adapting
from easydel.infra.registry import TaskType
from easydel.infra.untying import Untying
from easydel.lora.named import check_new
from easydel.paths import named_modules

PEFT_TASKS = {
    TaskType.CAUSAL_LM: "CAUSAL_LM",
    TaskType.SEQ2SEQ: "SEQ_2_SEQ_LM",
    TaskType.SEQUENCE_CLASSIFICATION: "SEQ_CLS",
    TaskType.TOKEN_CLASSIFICATION: "TOKEN_CLS",
    TaskType.QUESTION_ANSWERING: "QUESTION_ANS",
    TaskType.BASE: "FEATURE_EXTRACTION",
    TaskType.EMBEDDING: "FEATURE_EXTRACTION",
}
"""Our tasks → PEFT's names of them."""


def save(module: Any, directory: Path, name: str | None) -> None:
    """Write an adapter as PEFT does; see `EasyBridgeMixin.save_adapter`."""
    from easydel.lora.peft_files import write_adapter
    from easydel.lora.peft_save import adapter_content

    refuse_shapes(module, "save_adapter")
    base, revision = base_of(module)
    task = PEFT_TASKS.get(module.model_task)
    about = {"base_model_name_or_path": base, "revision": revision, "task_type": task}
    write_adapter(directory, *adapter_content(module, name, about))


def load(module: Any, source: str | os.PathLike[str], name: str, **options: Any) -> None:
    """Give a model an adapter from PEFT's files; see `EasyBridgeMixin.load_adapter`."""
    from easydel.lora.peft_files import read_adapter
    from easydel.lora.peft_load import load_adapter, warn_of_base
    from easydel.lora.peft_match import Names

    refuse_shapes(module, "load_adapter")
    check_new(module, name)
    files = read_adapter(source, **options)
    untying = Untying.of(module)
    untied, new = (None, ()) if untying is None else (untying.built, tuple(untying.new))
    loaded = load_adapter(files, module, Names.of(module, _left_out(module), untied, new))
    warn_of_base(files, *base_of(module))
    arrays = {path: {n: jnp.asarray(x) for n, x in given.items()} for path, given in loaded.arrays.items()}
    adapting.add(module, name, loaded.config, arrays=arrays, saved=loaded.saved)


def _left_out(module: Any) -> list[str]:
    """Return the paths that PEFT's `"all-linear"` leaves out: the head over the vocabulary, else a classifier's."""
    head = adapting.vocabulary_head(module)
    if head is not None:
        return [path for path, layer in named_modules(module).items() if layer is head]
    return adapting.heads_of(module) if module.model_task == TaskType.SEQUENCE_CLASSIFICATION else []


def base_of(module: Any) -> tuple[str | None, str | None]:
    """Return the directory or Hub id that a model was loaded from, and its commit on the Hub; `None`: not known."""
    source = getattr(module.config, "source_directory", None)
    if source is None:
        return None, None
    path = Path(source)
    parts = path.parts
    for place, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[place + 1] == "snapshots":  # the Hub's cache
            return part.removeprefix("models--").replace("--", "/"), parts[place + 2]
    return source, None
