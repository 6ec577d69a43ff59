"""Whether a checkpoint gives here what it gives in transformers, and if not, where the two part."""

from easydel.verification.report import Part, Verification
from easydel.verification.run import verify

__all__ = ["Part", "Verification", "verify"]
