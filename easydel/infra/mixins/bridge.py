"""`EasyBridgeMixin`: files, the Hub and PyTorch."""

from __future__ import annotations

from typing import Any, Self


class EasyBridgeMixin:
    """Loads and saves Hugging Face checkpoints; torch is needed only by `to_torch`."""
