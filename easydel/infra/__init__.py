"""The front door: base class, config, state, registry. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easydel.infra.base_config import EasyDeLBaseConfig
    from easydel.infra.base_module import EasyDeLBaseModule
    from easydel.infra.base_state import EasyDeLState
    from easydel.loss import LossConfig

_NAMES = {
    "EasyDeLBaseConfig": "easydel.infra.base_config",
    "EasyDeLBaseModule": "easydel.infra.base_module",
    "EasyDeLState": "easydel.infra.base_state",
    "LossConfig": "easydel.loss",
}

__all__ = ["EasyDeLBaseConfig", "EasyDeLBaseModule", "EasyDeLState", "LossConfig"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'easydel.infra' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value
