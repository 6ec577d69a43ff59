"""Small pieces to fine-tune and measure a language model: windows of text, a training loop, perplexity."""

from __future__ import annotations

from easydel.training.data import WindowedText
from easydel.training.evaluate import Perplexity, measure_perplexity
from easydel.training.fit import StepReport, fit

__all__ = ["Perplexity", "StepReport", "WindowedText", "fit", "measure_perplexity"]
