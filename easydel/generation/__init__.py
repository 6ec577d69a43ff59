"""Text from a model: options, what is done with scores, and the compiled loop."""

from easydel.generation.engine import generate, stream
from easydel.generation.many import generate_many, iterate_many
from easydel.generation.options import GenerationOptions
from easydel.generation.resolve import resolve_options

__all__ = ["GenerationOptions", "generate", "generate_many", "iterate_many", "resolve_options", "stream"]
