"""Files the package carries: a small trained model and a text to fine-tune it on.

Only paths are offered here; nothing is read and nothing heavy is imported.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def embedded_model_path() -> Path:
    """Return the directory of the embedded model, in the Hugging Face layout (its card is README.md there)."""
    return _HERE / "stdlib-4m"


def embedded_text_path() -> Path:
    """Return a short public-domain text, Act I of Shakespeare's *Richard III*, unlike anything the model has seen."""
    return _HERE / "texts" / "richard-iii.txt"


def embedded_validation_path() -> Path:
    """Return a part of the embedded model's validation text, on which its card states the perplexity."""
    return _HERE / "stdlib-4m" / "validation.txt"
