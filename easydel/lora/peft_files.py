"""The two files of a PEFT adapter: found, read as a config and a table of tensors, and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easydel.errors import CheckpointError
from easydel.hub.files import replace_files
from easydel.hub.resolve import check_link, read_limited, resolve_checkpoint
from easydel.hub.safetensors import TensorEntry, header_bytes, read_header, unique_json
from easydel.lora.peft_config import PeftConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk; of its tensors nothing is read yet.

    Attributes:
        directory: that holds them.
        config: what is in `adapter_config.json`.
        table: name → tensor.
    """

    directory: Path
    config: PeftConfig
    table: Mapping[str, TensorEntry]


def read_adapter(name_or_path: str | os.PathLike[str], **options: Any) -> AdapterFiles:
    """Find an adapter and read its config and the table of its tensors.

    Args:
        name_or_path: a directory, or a Hub id.
        **options: of the Hub, as `easydel.hub.resolve.resolve_checkpoint` takes them.

    Raises:
        CheckpointError: nothing there, or broken files.
        UnsupportedError: an adapter that is not offered here.
    """
    directory = resolve_checkpoint(name_or_path, adapter=True, **options)
    if not (directory / CONFIG).is_file():
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
        raise CheckpointError(f"{directory}: no adapter: expected {CONFIG} and {WEIGHTS}; it holds {held}")
    check_link(directory, CONFIG)
    where = str(directory / CONFIG)
    config = PeftConfig.from_dict(unique_json(read_limited(directory / CONFIG), where), where)
    return AdapterFiles(directory, config, _table(directory))


def _table(directory: Path) -> dict[str, TensorEntry]:
    if (directory / WEIGHTS).is_file():
        check_link(directory, WEIGHTS)
        return read_header(directory / WEIGHTS)
    if (directory / PICKLED).is_file():
        from easydel.hub.pickled import read_pickled

        check_link(directory, PICKLED)
        return read_pickled(directory / PICKLED)
    raise CheckpointError(f"{directory}: has {CONFIG}, but neither {WEIGHTS} nor {PICKLED}; fetch the adapter again")


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write an adapter, replacing one that is there all at once or not at all.

    Args:
        directory: a new or an existing one.
        config: content of `adapter_config.json`.
        tensors: name → array.

    Raises:
        CheckpointError: the directory is a file, read-only or too full; nothing is changed.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header = header_bytes({name: (array.dtype, array.shape) for name, array in ordered.items()}, {"format": "pt"})
    content = b"".join([header, *(np.ascontiguousarray(array).tobytes() for array in ordered.values())])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    replace_files(directory, {CONFIG: text.encode(), WEIGHTS: content}, stale=(PICKLED,))
