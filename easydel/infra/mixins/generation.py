"""`EasyGenerationMixin`: text from a model."""

from __future__ import annotations


class EasyGenerationMixin:
    """Generates tokens."""
