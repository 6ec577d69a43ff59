"""The config of an adapter, whatever way it was made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from flax import nnx

from easydel.distributed import whole
from easydel.lora.config import LoraConfig
from easydel.lora.named import Adapter, get_adapter
from easydel.paths import named_modules
from easydel.stacked import layer_paths


def adapter_config(module: nnx.Module, name: str | None = None) -> LoraConfig:
    """Return the config that an adapter was made from, else one that makes adapters like it.

    Args:
        module: the model.
        name: of the adapter, the active one if `None`.

    Raises:
        ValueError: there is none of this name.
    """
    adapter = get_adapter(module, name)
    return adapter.config or described(module, adapter)


def described(module: nnx.Module, adapter: Adapter) -> LoraConfig:
    """Return a config that names each layer of an adapter, with its rank and alpha."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, spec in adapter.specs.items():
        scales = whole(adapter.arrays[path]["scale"]).reshape(-1)
        for layer, scale in zip(layer_paths(path) or [path], scales, strict=True):
            ranks[layer], alphas[layer] = spec.rank, float(scale) * spec.rank
    rank, rank_pattern = usual(ranks)
    alpha, alpha_pattern = usual(alphas)
    modules = named_modules(module, by_layer=False)
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        pattern=f"^(?:{'|'.join(map(re.escape, ranks))})$",
        dropout=max(spec.dropout for spec in adapter.specs.values()),
        use_dora=any(spec.dora for spec in adapter.specs.values()),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fused=any(spec.shares for spec in adapter.specs.values()),
        modules_to_save=_modules_of(adapter.saved),
        embeddings=any(isinstance(modules[path], nnx.Embed) for path in adapter.specs),
    )


def _modules_of(variables: Iterable[str]) -> tuple[str, ...]:
    """Return an expression for the path of each module that holds one of these variables."""
    paths = (layer.rpartition("/")[0] for path in variables for layer in layer_paths(path) or [path])
    return tuple(f"^{re.escape(path)}$" for path in dict.fromkeys(paths))


def usual(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and the others by an expression for their path alone."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(path)}$": value for path, value in values.items() if value != usual}
