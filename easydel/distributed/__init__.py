"""Several processes as one run: how they find one another, and which of them speaks for all."""

from easydel.distributed.start import initialize, is_first

__all__ = ["initialize", "is_first"]
