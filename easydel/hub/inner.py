"""A text model that was saved inside a larger one, of images or sounds: its config, and its tensors' own names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from easydel.errors import CheckpointError
from easydel.hub.report import short
from easydel.hub.safetensors import TensorEntry

# A few models of images (SmolVLM, Idefics) say "text_model".
INSIDE = re.compile(r"^(model\.)?(language_model|text_model)\.")
_NESTED = re.compile(r"(^|\.)(language_model|text_model)\.")


def inner_config(content: Mapping[str, Any], model_type: str, where: object) -> dict[str, Any] | None:
    """Return the config of the one part of a larger model that is of this `model_type`; `None` if none is.

    Whether the head is tied is the larger model's to say, if it says it: there its head stands.

    Args:
        content: of the larger model's `config.json`.
        model_type: of the part.
        where: names the file in errors.

    Raises:
        CheckpointError: several parts are of this `model_type`.
    """
    parts = [n for n, part in content.items() if isinstance(part, Mapping) and part.get("model_type") == model_type]
    if len(parts) > 1:
        raise CheckpointError(
            f"{where}: {', '.join(map(short, parts))} are all of model_type {model_type!r}, and which one is meant "
            "cannot be told; pass config="
        )
    if not parts:
        return None
    tied = content.get("tie_word_embeddings")
    return {**content[parts[0]]} | ({} if tied is None else {"tie_word_embeddings": tied})


def inner_table(
    table: Mapping[str, TensorEntry], wanted: Collection[str], prefix: str, heads: tuple[str, ...]
) -> tuple[Mapping[str, TensorEntry], dict[str, int]]:
    """Return the tensors of the text model in a larger one under the names they have alone, and what else there is.

    `language_model.model.layers…`, `model.language_model.layers…` and `language_model.layers…` are all the layers'.
    What stands beside is a part of the larger model, unless the text model itself has something of that name.

    Args:
        table: of the checkpoint; one that holds nothing of the kind is returned as it is.
        wanted: the names of the module's tensors.
        prefix: of its backbone, such as `model`.
        heads: how the names of heads begin; they stay.

    Returns:
        The table, and part of the larger model → how many tensors of it were left out.

    Raises:
        CheckpointError: two tensors have the same name in the text model.
    """
    if not any(map(INSIDE.match, table)) or any(_NESTED.search(name) for name in wanted):
        return table, {}
    own = {_first(name, prefix)[1] for name in wanted}
    inner: dict[str, TensorEntry] = {}
    parts: dict[str, int] = {}
    for name, entry in table.items():
        match = INSIDE.match(name)
        if match is None:
            part, first = _first(name, prefix)
            if first not in own and not name.startswith(heads):
                parts[part] = parts.get(part, 0) + 1
                continue
        new = name if match is None else (f"{prefix}." if match[1] and prefix else "") + name[match.end() :]
        if new in inner:
            raise CheckpointError(
                f"{entry.file}: {name!r} and another tensor are both {new!r} of the model inside; which one is meant "
                "cannot be told. Remove one of them"
            )
        inner[new] = entry
    return inner, dict(sorted(parts.items()))


def _first(name: str, prefix: str) -> tuple[str, str]:
    """Return the module that a tensor's name begins with, backbones' prefixes included and left out."""
    start = next((f"{p}." for p in (prefix, "model") if p and name.startswith(f"{p}.")), "")
    first = name.removeprefix(start).partition(".")[0]
    return start + first, first
