"""The parts of a model that every language model has under some name: embedding, head, encoder, decoder.

Embedding and head are found by what the model's class builds differently for another `config.vocab_size`, so that
neither names nor sizes that happen to be equal are taken for an answer.
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from easydel.errors import UnsupportedError
from easydel.infra.registry import TaskType
from easydel.infra.vocabulary import Differences, changed_configs, differences, vocabulary_size
from easydel.paths import named_modules, named_variables

TOKEN_TASKS = frozenset(
    {
        TaskType.CAUSAL_LM,
        TaskType.SEQ2SEQ,
        TaskType.MASKED_LM,
        TaskType.IMAGE_TEXT_TO_TEXT,
        TaskType.SPEECH_SEQ2SEQ,
    }
)
"""Tasks whose logits are over the vocabulary: without a head of its own, such a model uses its embedding."""


def token_embedding(module: Any) -> nnx.Embed:
    """Return the embedding of input tokens: the one `nnx.Embed` whose table has a row for each token.

    Raises:
        ValueError: there is none, or there are several; they are named.
    """
    axes = _vocabulary_differences(module).axes
    # A head's kernel is not there if it is quantized.
    variables = {id(held): axes[path] for path, held in named_variables(module).items() if path in axes}
    found = {
        id(layer.embedding): (path, layer)  # layers that share a table are one answer
        for path, layer in reversed(named_modules(module).items())
        if isinstance(layer, nnx.Embed) and variables.get(id(layer.embedding)) == 0
    }
    return _only(module, dict(found.values()), "get_embedding", "an nnx.Embed with config.vocab_size rows")


def lm_head(module: Any) -> nnx.Module | None:
    """Return the layer that makes logits over the vocabulary.

    Returns:
        The layer whose `kernel` `[…, vocab]` has a column for each token; the embedding itself, if the model's task is
        to predict tokens and it has no such layer (a tied head); `None` for any other (backbones, classifiers).

    Raises:
        ValueError: there are several such layers; they are named.
    """
    modules, built = named_modules(module), _vocabulary_differences(module)
    found = {}
    for path, axis in built.axes.items():
        parent, _, leaf = path.rpartition("/")
        if leaf == "kernel" and axis == len(built.before[path]) - 1:
            found[parent] = modules[parent]
    if found:
        return _only(module, found, "get_lm_head", "")
    return module.get_embedding() if module.model_task in TOKEN_TASKS else None


def encoder(module: Any) -> nnx.Module:
    """Return the encoder: of two stacks the one that reads, of an encoder-only model the backbone.

    Raises:
        UnsupportedError: the model is a decoder only.
    """
    if stacks := _two_stacks(module):
        return stacks[0]
    backbone = _backbone(module)
    if _decodes(backbone):
        raise UnsupportedError(
            f"get_encoder is not supported by {type(module).__name__}: it is a decoder only, one stack of layers that "
            "predicts the next token; get_decoder() returns it"
        )
    return backbone


def decoder(module: Any) -> nnx.Module:
    """Return the decoder: of two stacks the one that writes, of a decoder-only model the backbone.

    Raises:
        UnsupportedError: the model is an encoder only.
    """
    if stacks := _two_stacks(module):
        return stacks[1]
    backbone = _backbone(module)
    if not _decodes(backbone):
        raise UnsupportedError(
            f"get_decoder is not supported by {type(module).__name__}: it is an encoder only, one stack of layers that "
            "predicts no next token; get_encoder() returns it"
        )
    return backbone


def _vocabulary_differences(module: Any) -> Differences:
    # Twice the size shows even where a class rounds the size of its table up.
    return differences(module, changed_configs(module.config, 2 * vocabulary_size(module.config)))


def _only(module: Any, found: dict[str, Any], method: str, expected: str) -> Any:
    if len(found) == 1:
        return next(iter(found.values()))
    name = type(module).__name__
    if not found:
        raise ValueError(f"{name} lacks {expected}; a class with another kind of layer defines {method} itself")
    raise ValueError(
        f"{name} has {len(found)} layers that depend on config.vocab_size, and any could be the answer: "
        f"{', '.join(found)}; define {method} in {name} and return the one that is meant"
    )


def _backbone(module: Any) -> Any:
    """Return what a task's head stands on; the module itself, if it is no head on a backbone."""
    held = getattr(module, getattr(module, "base_model_prefix", "") or "", None)
    return held if isinstance(held, nnx.Module) else module


def _two_stacks(module: Any) -> tuple[Any, Any] | None:
    for owner in (module, _backbone(module)):
        # Both, not one of them: a head may be called a decoder, too.
        stacks = (getattr(owner, "encoder", None), getattr(owner, "decoder", None))
        if all(isinstance(stack, nnx.Module) for stack in stacks):
            return stacks
    return None


def _decodes(backbone: Any) -> bool:
    """Whether one stack counts as a decoder: unless its class says that it cannot generate."""
    return bool(getattr(backbone, "can_generate", True))
