"""Text from a model: options, sampling, and the compiled loop."""

from easydel.generation.engine import generate, stream
from easydel.generation.options import GenerationOptions, resolve_options

__all__ = ["GenerationOptions", "generate", "resolve_options", "stream"]
