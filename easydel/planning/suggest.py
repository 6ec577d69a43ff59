"""Which meshes a training step fits on, those that send least first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from easydel.hub.save import parse_size
from easydel.infra.base_config import REMAT_POLICIES
from easydel.planning.measure import depth
from easydel.planning.plan import Plan
from easydel.planning.planner import as_optimizer, default_sequence_length, floating, plans, resolve
from easydel.planning.step import Setup, Step, bytes_per_device
from easydel.sharding import PartitionRules, abstract_mesh
from easydel.sharding.explain_text import bytes_text

WIDEST = 8
"""Tensor parallelism sums activations four times a layer, fast enough only between the devices of one host."""

TRIES = 6
"""So many meshes are compiled for in the order of what they send, and as many more in that of what they hold."""

_SPLIT_BY_TP = ("num_attention_heads", "num_key_value_heads", "num_heads", "intermediate_size")


@dataclass(frozen=True)
class Suggestion:
    """A mesh on which a step fits.

    Attributes:
        axes: name → size of each axis.
        remat: of the policies that fit the one that recomputes least.
        collective_bytes: of all collectives' results on one device, in a step.
        plan: of this mesh and policy.
    """

    axes: dict[str, int]
    remat: str
    collective_bytes: int
    plan: Plan


def suggest_mesh(
    model: Any,
    devices: int,
    memory: int | str,
    config: Any = None,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    optimizer: Any = "adamw",
    remat: str | None = None,
    scan_layers: bool | None = None,
    cache_length: int | None = None,
    rules: PartitionRules | None = None,
    count: int = 3,
) -> tuple[Suggestion, ...]:
    """Look for meshes on which a training step fits.

    Parameters are split over `fsdp` and copied over `dp`; `tp` divides heads and MLPs and is at most 8; `ep` divides
    the experts. Meshes are tried in the order of what they would send for a row by formula; those that fit are given
    back in the order of what they send for a row as compiled.

    Args:
        model: as in `plan_training`, like all that is not named here.
        devices: how many there are.
        memory: of each, in bytes or such as `"80GB"` (decimal).
        config: of a class.
        batch_size: rows over all devices; on each mesh one for each part of the batch (`dp·fsdp`) if `None`.
        sequence_length: tokens of a row.
        dtype: of the computation.
        param_dtype: of the stored parameters.
        optimizer: a name, or one of optax's.
        remat: the only policy to consider; any if `None`.
        scan_layers: whether layers are in a scan.
        cache_length: of generation; it is not counted into what must fit.
        rules: partition rules.
        count: how many meshes to look for.

    Raises:
        ValueError: no mesh was found; the message says which comes closest and how much it lacks.
    """
    if devices < 1 or count < 1:
        raise ValueError(f"devices and count must be positive, got {devices} and {count}")
    cls, config = resolve(model, config)
    room, policies = parse_size(memory, "memory"), REMAT_POLICIES if remat is None else (remat,)
    length = default_sequence_length(config) if sequence_length is None else sequence_length
    tx = as_optimizer(optimizer)
    types = floating(dtype, "dtype"), floating(param_dtype, "param_dtype")
    setup = Setup(cls, config, None, rules, tx, None, batch_size or 0, length, *types)
    candidates = _candidates(setup, devices)
    # Where parameters and optimizer alone do not fit, nothing need be compiled.
    missing = {_text(candidate): candidate.held - room for candidate in candidates if candidate.held > room}
    found: list[Suggestion] = []
    for candidate in _in_order([candidate for candidate in candidates if candidate.held <= room], room):
        by_policy = _plans_that_fit(candidate.setup, policies, room, scan_layers, cache_length)
        if isinstance(by_policy, int):
            missing[_text(candidate)] = by_policy
        else:
            found.append(_chosen(by_policy))
        if len(found) == count:
            break
    if not found:
        where, lacking = min(missing.items(), key=lambda item: item[1])
        rows = f"{batch_size} rows" if batch_size else "one row for each part of the batch"
        raise ValueError(
            f"{cls.__name__}: found no mesh of {devices} devices with {bytes_text(room)} each that holds a step of "
            f"{rows}, {length} tokens each; {where} comes closest and lacks at least {bytes_text(lacking)}: take "
            "more devices, a smaller batch, shorter sequences or a smaller param_dtype"
        )
    return tuple(sorted(found, key=lambda found: found.collective_bytes / found.plan.batch_size))


def _plans_that_fit(
    setup: Setup, policies: Sequence[str], room: int, scan_layers: bool | None, cache_length: int | None
) -> list[Plan] | int:
    """Return the plans of a mesh that fit, or else how many bytes are missing."""
    thriftiest = "full" if "full" in policies else policies[0]  # if this does not fit, the others need no compiling
    least = plans(setup, (thriftiest,), scan_layers, cache_length)[thriftiest]
    if not least.fits(room):
        return least.total_bytes_per_device - room
    if len(policies) == 1:
        return [least]
    return [plan for plan in plans(setup, policies, scan_layers, cache_length).values() if plan.fits(room)]


def _chosen(fitting: Sequence[Plan]) -> Suggestion:
    def cost(plan: Plan) -> tuple[int, int]:
        return plan.flops_per_step["recomputation"][plan.remat], plan.total_bytes_per_device

    plan = min(fitting, key=cost)
    sent = sum(size for by_axes in plan.collective_bytes_per_step.values() for size in by_axes.values())
    return Suggestion(dict(plan.axes), plan.remat, sent, plan)


@dataclass(frozen=True, eq=False)
class _Candidate:
    setup: Setup
    held: int
    gradients: int
    sent: float


def _candidates(setup: Setup, devices: int) -> list[_Candidate]:
    found = []
    for axes in _meshes(setup.config, devices, setup.batch_size):
        placed = replace(setup, mesh=abstract_mesh(axes), batch_size=setup.batch_size or axes["dp"] * axes["fsdp"])
        arguments = Step(placed, placed.config_with(scan_layers=True)).arguments
        held = bytes_per_device(arguments.params) + bytes_per_device(arguments.opt_state)
        found.append(_Candidate(placed, held, bytes_per_device(arguments.params), _sent(placed, arguments.params)))
    if not found:
        raise ValueError(
            f"batch_size={setup.batch_size} is divided by no mesh of {devices} devices: take a multiple of {devices}"
        )
    return found


def _in_order(candidates: Sequence[_Candidate], room: int) -> list[_Candidate]:
    """Return the meshes to compile for: those that send least, and in case none fits, those that hold least.

    Gradients are mostly held all at once, so that meshes where they would not fit come last.
    """
    first = sorted(candidates, key=lambda c: (c.held + c.gradients > room, c.sent))[:TRIES]
    rest = sorted((c for c in candidates if c not in first), key=lambda candidate: (candidate.held, candidate.sent))
    return first + rest[:TRIES]


def _text(candidate: _Candidate) -> str:
    axes = candidate.setup.mesh.shape.items()
    return ",".join(f"{name}={size}" for name, size in axes if size > 1) or "one device"


def _meshes(config: Any, devices: int, batch_size: int) -> Iterator[dict[str, int]]:
    split = [size for name in _SPLIT_BY_TP if isinstance(size := getattr(config, name, None), int) and size]
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    for tp in (n for n in _divisors(math.gcd(devices, *split)) if n <= WIDEST):
        for ep in _divisors(math.gcd(devices // tp, experts)):
            rest = devices // (tp * ep)
            if batch_size % rest == 0:
                for fsdp in _divisors(rest):
                    yield {"dp": rest // fsdp, "fsdp": fsdp, "ep": ep, "tp": tp}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _sent(setup: Setup, params: Any) -> float:
    """Estimate the bytes a device sends for a row of the batch, by the usual rings.

    Parameters split over `fsdp` are gathered forward and backward, gradients are summed over all rows' devices
    (twice their bytes), and activations four times a layer over `tp` and `ep`.
    """
    shape = setup.mesh.shape
    fsdp, rows, wide = shape["fsdp"], shape["dp"] * shape["fsdp"], shape["tp"] * shape["ep"]
    sent = 0.0
    for leaf in jax.tree.leaves(params):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        gathered = part * (fsdp if "fsdp" in str(leaf.sharding.spec) else 1)
        sent += 2 * (gathered - part) + 2 * gathered * (rows - 1) / rows
    width = getattr(setup.config, "hidden_size", 0) or 0
    tokens = setup.batch_size // rows * setup.sequence_length
    summed = 4 * depth(setup.config) * tokens * width * jnp.dtype(setup.dtype).itemsize
    return (sent + 2 * summed * (wide - 1) / wide) / setup.batch_size
