"""Every family computes on every mesh what it computes on one device, and lies there as `explain_sharding` says.

By default one layer of each kind of model meets one mesh; `-m slow` has all families, meshes and layers, those under a
scan included.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import pytest
from flax import nnx

from tests.models.table import FAMILIES
from tests.sharding.equality import Subject, check, inputs_of, numbers, subject
from tests.sharding.held import MESHES, ONE_OF_A_KIND, held, mesh_named
from tests.spec.user_models import MixingModel, MyModel, MyModelConfig

CHOSEN = {
    "llama": "six",
    "gpt2": "sequence",
    "mamba2": "mixed",
    "mixtral": "experts",
    "bert": "fsdp",
    "t5": "tp",
}


def fits(family: str, mesh: str) -> bool:
    return mesh != "experts" or family == "mixtral"


MATRIX = [(family, mesh) for family in FAMILIES for mesh in MESHES if fits(family, mesh)]


def test_the_chosen_pairs_cover_all() -> None:
    assert CHOSEN.keys() == {*ONE_OF_A_KIND}
    assert all(max(sizes) > 1 for sizes in zip(*(MESHES[mesh] for mesh in CHOSEN.values()), strict=True)), "every axis"
    assert all(fits(*pair) for pair in CHOSEN.items())


def check_places(model: Any, mesh: str) -> int:
    """Check what devices hold, and what the report says was dropped, against arithmetic; return how much was."""
    explanation = model.explain_sharding()
    assert held(model) == explanation.bytes_per_device
    sizes, dropped = dict(mesh_named(mesh).shape), 0
    for row in explanation.parameters:
        missing = axes(row.requested) - axes(row.actual)
        assert {drop.axis for drop in row.dropped} == missing, row.path
        for drop in row.dropped:
            assert row.shape[drop.dimension] % (sizes[drop.axis] * drop.kept), f"{drop} although it divides"
        parts = math.prod(sizes[axis] for axis in axes(row.actual))
        assert row.bytes_per_device * parts == row.bytes, row.path
        dropped += len(missing)
    return dropped


def axes(spec: Any) -> set[str]:
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None)
    return {axis for entry in entries for axis in entry}


@pytest.mark.parametrize(("family", "mesh"), CHOSEN.items())
def test_a_mesh_computes_what_one_device_does(family: str, mesh: str) -> None:
    dropped = check_places(check(subject(family, layers=1), mesh, family), mesh)
    if mesh == "six":
        assert dropped, "here sizes were to be dropped that do not divide"


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["list", "scan"])
@pytest.mark.parametrize(("family", "mesh"), MATRIX)
def test_every_mesh_computes_what_one_device_does(family: str, mesh: str, scan: bool) -> None:
    dropped = check_places(check(subject(family, scan=scan), mesh, f"{family}{' scan' * scan}"), mesh)
    assert dropped or mesh not in ("five", "six")


@functools.cache
def user_model(cls: type) -> Subject:
    config = MyModelConfig()
    params = numbers(cls(config, rngs=nnx.Rngs(0)), small_queries=False)
    return Subject(lambda: cls(config, rngs=nnx.Rngs(0)), params, inputs_of(config, mask=False))


@pytest.mark.filterwarnings("ignore:.*takes no cache")
@pytest.mark.parametrize(
    ("cls", "mesh"),
    [
        (MyModel, "mixed"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((MyModel, "six"), (MixingModel, "tp"))),
    ],
)
def test_models_of_plain_layers(cls: type, mesh: str) -> None:
    model = check(user_model(cls), mesh, cls.__name__)
    check_places(model, mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.params))
