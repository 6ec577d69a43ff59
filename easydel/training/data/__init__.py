"""Data for language models: documents from files, cut and packed into batches, resumable at any batch."""

from __future__ import annotations

from easydel.training.data.batch import IGNORED, Batch, check_batch_fits
from easydel.training.data.config import DataConfig
from easydel.training.data.loader import Loader, make_loader
from easydel.training.data.packing import Statistics
from easydel.training.data.windows import WindowedText

__all__ = ["IGNORED", "Batch", "DataConfig", "Loader", "Statistics", "WindowedText", "check_batch_fits", "make_loader"]
