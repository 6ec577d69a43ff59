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
    modules = named_modules(module, by_layer=False)
    return config_of(
        ranks,
        alphas,
        saved=[layer for path in adapter.saved for layer in layer_paths(path) or [path]],
        dropout=max(spec.dropout for spec in adapter.specs.values()),
        use_dora=any(spec.dora for spec in adapter.specs.values()),
        fused=any(spec.shares for spec in adapter.specs.values()),
        embeddings=any(isinstance(modules[path], nnx.Embed) for path in adapter.specs),
    )


def config_of(ranks: dict[str, int], alphas: dict[str, Any], saved: Iterable[str], **others: Any) -> LoraConfig:
    """Return a config that names each layer.

    Args:
        ranks: path of a layer → rank.
        alphas: path → alpha.
        saved: paths of the parameters that are trained whole.
        **others: further fields of the config.
    """
    rank, rank_pattern = usual(ranks)
    alpha, alpha_pattern = usual(alphas)
    whole = dict.fromkeys(path.rpartition("/")[0] for path in saved)
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        pattern=f"^(?:{'|'.join(map(re.escape, ranks))})$",
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        modules_to_save=tuple(f"^{re.escape(path)}$" for path in whole),
        **others,
    )


def usual(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and the others by an expression for their path alone."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(path)}$": value for path, value in values.items() if value != usual}
