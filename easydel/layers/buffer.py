"""Numbers that belong to a model's files and are not trained."""

from __future__ import annotations

from flax import nnx


class Buffer(nnx.Variable):
    """What torch calls a persistent buffer: saved and loaded as strictly as a parameter, but none.

    It takes no gradient, keeps its dtype, and is not among `model.params`.
    """

    must_load = True
