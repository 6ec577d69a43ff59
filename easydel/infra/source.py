"""What a checkpoint's `config.json` says alone, no weights needed: its config, and our class for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easydel.errors import UnsupportedError
from easydel.infra.registry import SUFFIXES, TaskType, get_module_class


def read_config(source: str) -> Any:
    """Return a checkpoint's config.

    Args:
        source: a folder or a Hub id; of a Hub id nothing else is fetched.
    """
    from easydel.infra.auto import AutoEasyDeLConfig

    if not Path(source).is_dir() and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from huggingface_hub import hf_hub_download

        return AutoEasyDeLConfig.from_pretrained(Path(hf_hub_download(source, "config.json")).parent)
    return AutoEasyDeLConfig.from_pretrained(source)


def model_class(config: Any) -> Any:
    """Return our class for the architecture that a config names, a causal language model if it names none of ours."""
    named = (getattr(config, "architectures", None) or [""])[0]
    for task, suffix in SUFFIXES.items():
        if task is not TaskType.BASE and named.endswith(suffix):
            return get_module_class(task, config.model_type)
    try:
        return get_module_class(TaskType.CAUSAL_LM, config.model_type)
    except UnsupportedError:
        return get_module_class(TaskType.BASE, config.model_type)
