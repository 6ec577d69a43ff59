"""The same model in transformers: load it, and record what its modules return."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from easydel.errors import CheckpointError, UnsupportedError
from easydel.hub.report import short
from easydel.verification.recording import Call

if TYPE_CHECKING:
    import torch


def require_torch() -> None:
    """Raise if transformers' models cannot be run.

    Raises:
        UnsupportedError: torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "comparing with transformers is not supported without torch; install it (pip install torch)"
        ) from error


def load_reference(cls: Any, directory: Path, dtype: str) -> torch.nn.Module:
    """Load a model of transformers on the CPU, with plain attention.

    Raises:
        CheckpointError: it does not load, or lacks tensors: in their place would be random numbers.
    """
    import torch
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, found = cls.from_pretrained(
            directory,
            attn_implementation="eager",
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, LookupError) as error:
        raise CheckpointError(f"{directory}: transformers' {cls.__name__} does not load it: {error!s:.500}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{directory}: transformers' {cls.__name__} finds no {', '.join(map(short, missing[:5]))}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}, and would make random numbers of it; "
            "choose the task that the checkpoint was saved for"
        )
    return model.eval()


def run_reference(
    model: Any, inputs: Mapping[str, np.ndarray]
) -> tuple[dict[str, Call], dict[str, np.ndarray], dict[str, frozenset[str]]]:
    """Run a model of transformers once.

    Returns:
        Name → call of its modules; name → float array of what it returns; name → tensors of its modules.
    """
    import torch

    calls: dict[str, Call] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hook = module.register_forward_hook(_hook(name, calls), with_kwargs=True)
                hooks.callback(hook.remove)
        model.config.use_cache = False
        out = model(**{name: torch.from_numpy(value).long() for name, value in inputs.items()})
        outputs = {name: _floats(value) for name, value in out.items() if _is_float(value)}
    return calls, outputs, _tensors(model)


def _hook(name: str, calls: dict[str, Call]) -> Any:
    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        if name not in calls:
            given = _arrays((args, kwargs))
            calls[name] = Call(len(calls), given[0] if given else None, tuple(_arrays(out)))

    return hook


def _arrays(tree: Any) -> list[np.ndarray]:
    if _is_float(tree):
        return [_floats(tree)]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [array for item in tree for array in _arrays(item)]


def _is_float(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _floats(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy().copy()  # what a module returned may be changed in place later


def _tensors(model: Any) -> dict[str, frozenset[str]]:
    names = list(model.state_dict())
    return {
        module: frozenset(name for name in names if name.startswith(f"{module}."))
        for module, _ in model.named_modules()
        if module
    }
