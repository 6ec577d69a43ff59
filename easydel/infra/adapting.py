"""How the base class gives its layers adapters: what its head is, and what must be untied first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.calls import refuse_shapes
from easydel.errors import UnsupportedError
from easydel.infra import parts
from easydel.infra.untying import Untying
from easydel.infra.vocabulary import text_config
from easydel.lora import Adapter, LoraConfig, adapted_layers, combined, get_adapter, named, planned, put_adapter
from easydel.lora.adapters import Arrays
from easydel.lora.choose import Planned, is_adaptable
from easydel.lora.named import check_usable
from easydel.lora.saved import is_inside, saved_modules
from easydel.paths import matching, named_modules


def apply(module: Any, name: str, config: LoraConfig, rngs: nnx.Rngs | None) -> None:
    """Give a model its first adapter; see `EasyDeLBaseModule.apply_lora_to_layers`."""
    if layers := adapted_layers(module):
        raise ValueError(
            f"the model has adapters already ({next(iter(layers))} and others): add_adapter(name, LoraConfig(…)) gives "
            "it another one, unwrap_lora_to_layers() folds them in, delete_adapter(name) removes them"
        )
    add(module, name, config, rngs)


def add(
    module: Any,
    name: str,
    config: LoraConfig,
    rngs: nnx.Rngs | None = None,
    arrays: Mapping[str, Arrays] | None = None,
    saved: Mapping[str, Any] | None = None,
) -> None:
    """Give a model an adapter, untying embedding and head if it parts them; see `EasyDeLBaseModule.add_adapter`.

    Args:
        module: the model.
        name: of the adapter.
        config: of it.
        rngs: for its initial numbers and dropout, `nnx.Rngs(0)` if `None`.
        arrays: path of each layer, as it is stored → arrays (`easydel.lora.adapters`); `None`: new ones.
        saved: stored path → array of parameters of `modules_to_save`; `None`: those of the model.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"expected a LoraConfig, got {type(config).__name__}")
    refuse_shapes(module, "an adapter")
    check_usable(adapted_layers(module), "another adapter")
    rngs = nnx.Rngs(0) if rngs is None else rngs
    key = rngs.params()
    key = jax.random.wrap_key_data(key) if jnp.issubdtype(key.dtype, jnp.integer) else key
    untying = _untying(module, config)
    if untying is not None:
        untying.install()
    try:
        put_adapter(module, name, _plan(module, config), key, arrays, config, saved)
    except BaseException:
        if untying is not None:
            untying.undo()
        raise
    if untying is not None:
        untying.tell()
    if module.is_sharded:
        module._mark_sharded(module.last_mesh)


def add_weighted(
    module: Any, names: Sequence[str], weights: Sequence[float], combination_type: str, name: str, rank: int | None
) -> None:
    """Put a combination of adapters beside them; see `EasyDeLBaseModule.add_weighted_adapter`."""
    if isinstance(names, str) or len(set(names)) != len(list(names)):
        raise ValueError(f"adapter names {names!r}: expected a list of different names")
    parts_ = {each: get_adapter(module, each) for each in names}
    made: Adapter = combined(parts_, weights, combination_type, rank)
    named.shelve(module, name, made)


def heads_of(module: Any) -> list[str]:
    """Return the paths of the modules that are a model's head: what stands outside of its backbone.

    Without a backbone under `base_model_prefix`, it is the layer that makes logits over the vocabulary, if any.

    Raises:
        ValueError: several layers could be that one.
    """
    prefix = getattr(module, "base_model_prefix", "") or ""
    modules = named_modules(module)
    if isinstance(getattr(module, prefix, None) if prefix else None, nnx.Module):
        return sorted({path.split("/")[0] for path in modules} - {"", prefix})
    head = vocabulary_head(module)
    return [path for path, layer in modules.items() if layer is head and not isinstance(layer, nnx.Embed)]


def vocabulary_head(module: Any) -> nnx.Module | None:
    """Return the layer that makes logits over the vocabulary, a tied embedding too; `None` if there is none."""
    has_vocabulary = hasattr(text_config(module.config), "vocab_size")
    return parts.lm_head(module) if has_vocabulary else None


def _plan(module: Any, config: LoraConfig) -> list[Planned]:
    plan = planned(module, config, heads_of(module) if config.pattern is None else ())
    whole = saved_modules(module, config.modules_to_save)
    adapted = [one.chosen.paths[0] for one in plan if isinstance(one.chosen.layer, nnx.Embed)]
    modules = named_modules(module) if adapted or whole else {}
    tied = [
        *adapted,
        *(path for path, layer in modules.items() if isinstance(layer, nnx.Embed) and is_inside(path, whole)),
    ]
    head = vocabulary_head(module) if tied else None
    if shared := [path for path in tied if modules[path] is head]:
        raise UnsupportedError(
            f"{shared[0]} is the model's head, too, and {type(module).__name__} builds no head of its own for "
            "tie_word_embeddings=False: an adapter of it is not supported"
        )
    return plan


def _untying(module: Any, config: LoraConfig) -> Untying | None:
    """Return how embedding and head are untied, if the config chooses either; `None` if nothing is to be untied."""
    if config.pattern is None and not config.embeddings and not config.modules_to_save:
        return None
    untying = Untying.of(module)
    if untying is None:
        return None
    heads = [path for path, layer in untying.new.items() if is_adaptable(layer)]
    embeddings = [path for path, layer in named_modules(module).items() if layer is module.get_embedding()]
    wanted = [*heads, *(embeddings if config.embeddings else ())]
    if any(_is_meant(pattern, [*untying.new, *embeddings]) for pattern in config.modules_to_save):
        return untying
    if config.pattern is None:  # all embeddings, the head is left out
        return untying if config.embeddings else None
    return untying if _is_meant(config.pattern, wanted) else None


def _is_meant(pattern: str, paths: Sequence[str]) -> bool:
    try:
        return bool(matching(pattern, paths))
    except ValueError:
        return False
