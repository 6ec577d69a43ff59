"""Compiles a family's forward pass or training step on a mesh, and counts what devices send each other in it."""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax

import easydel
from easydel.paths import flatten
from easydel.sharding import create_mesh
from tests.models.table import FAMILIES
from tests.sharding.equality import inputs_of, train_step
from tests.sharding.held import zeros

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
# `%name = type op(`: where one is defined, not where its result is used; an asynchronous one counts where it starts.
DEFINITION = re.compile(rf"^\s*(?:ROOT )?%[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """A compiled program on a mesh.

    Attributes:
        counts: kind → how many there are; those in the body of a loop count once.
        types: kind → the types of what they give.
        split: how many parameters are split over `fsdp`, so that they must be gathered.
        layers: of the family's decoder or encoder.
        parameters: how many numbers they are.
        temporaries: bytes on each device besides arguments and results.
    """

    counts: dict[str, int]
    types: dict[str, list[str]]
    split: int
    layers: int
    parameters: int
    temporaries: int


def count(text: str) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the collectives in the text of a compiled program, and what they give."""
    found = [(match[2], match[1]) for match in DEFINITION.finditer(text)]
    kinds = Counter(kind for kind, _ in found)
    return dict(kinds), {kind: [type_ for k, type_ in found if k == kind] for kind in kinds}


@functools.cache
def program(
    family: str, dims: Sequence[int], what: str, *, batch: int = 8, optimizer: str = "sgd", fields: tuple = ()
) -> Program:
    """Compile a family's program.

    Args:
        family: its name in the table.
        dims: sizes of the mesh axes dp, fsdp, ep, tp, sp.
        what: `"forward"`, or `"step"` for loss, gradients and the optimizer's update.
        batch: rows.
        optimizer: `"sgd"` or `"adamw"`.
        fields: of the config, as pairs.
    """
    row = FAMILIES[family]
    cls = getattr(easydel, row.class_name(row.main_task, "ours"))
    config = cls.config_class(**row.tiny(dict(fields)))
    devices = jax.devices()[: int(np.prod(dims))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\d+ mesh axis\(es\) dropped")
        model = zeros(cls, config).shard_model(mesh=create_mesh(dims, devices=devices))
    inputs = {name: x[:batch] for name, x in inputs_of(config, mask=False).items()}
    if what == "forward":
        labels = inputs.pop("labels")
        inputs |= {"decoder_input_ids": np.abs(labels)} if row.main_task == "seq2seq" else {}
        lowered = jax.jit(model.pure_transform_fn()).lower(model.params, inputs)
    else:
        state = model.to_state(optax.sgd(0.1) if optimizer == "sgd" else optax.adamw(1e-3))
        lowered = train_step.lower(state, inputs)
    leaves = flatten(model.params, by_layer=False).values()
    compiled = lowered.compile()
    return Program(
        *count(compiled.as_text()),
        split=sum("fsdp" in str(leaf.sharding.spec) for leaf in leaves),
        layers=config.num_hidden_layers,
        parameters=sum(leaf.size for leaf in leaves),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
    )
