"""From a config and a mesh to a `Plan`."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from easydel.infra import placing
from easydel.infra.base_config import REMAT_POLICIES
from easydel.infra.base_module import EasyDeLBaseModule
from easydel.infra.source import model_class, read_config
from easydel.planning.batch import check_divides, has_loss
from easydel.planning.cache import cache_bytes
from easydel.planning.collectives import Moved
from easydel.planning.measure import Measured, measure, scans
from easydel.planning.plan import Plan
from easydel.planning.simulated import simulated_mesh
from easydel.planning.step import Setup, Step, bytes_per_device, count
from easydel.planning.work import forward_flops, step_flops
from easydel.sharding import AnyMesh, PartitionRules, parse_mesh
from easydel.sharding.activations import ROLES

SEQUENCE_LENGTH = 4096
OPTIMIZERS: dict[str, Any] = {"adamw": optax.adamw, "sgd": optax.sgd, "lion": optax.lion, "adafactor": optax.adafactor}


def plan_training(
    model: Any,
    mesh: Any,
    config: Any = None,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    optimizer: str | optax.GradientTransformation = "adamw",
    remat: str | None = None,
    policies: Sequence[str] = REMAT_POLICIES,
    scan_layers: bool | None = None,
    cache_length: int | None = None,
    rules: PartitionRules | None = None,
    batch: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Plan:
    """Work out what training a model takes on each device of a mesh; nothing is allocated or run.

    The step (value and gradient, update, the state donated and given back in its shardings) is compiled by XLA for
    simulated CPU devices. `total` is what XLA then lays out: the arguments, and the arena of everything else.

    Args:
        model: a folder with a `config.json` or a Hub id, a config, or a class (then with `config`).
        mesh: such as `"fsdp=64,tp=8"`, a mapping of axis sizes, or a mesh; it need not exist here.
        config: of a class.
        batch_size: rows over all devices; one for each part of the batch (`dp·fsdp`) if `None`.
        sequence_length: tokens of a row; 4096 if `None`, or what the model has positions for if that is less.
        dtype: of the computation.
        param_dtype: of the stored parameters.
        optimizer: `"adamw"`, `"sgd"`, `"lion"`, `"adafactor"`, or one of optax's. A leaf of its state that has a
            parameter's shape is split like it, any other is held whole.
        remat: the policy to plan for, the config's `gradient_checkpointing` if `None`.
        policies: those to compare it with; each costs a compilation.
        scan_layers: whether layers are in a scan; `None`: as the config says, and always above 24 layers.
        cache_length: positions of the cache of generation, `sequence_length` if `None`.
        rules: partition rules, those of the config or inferred ones if `None`.
        batch: name → shape of the arguments of the forward pass, for a class that takes others than its task's.

    Raises:
        ValueError: an unknown policy or optimizer, or a batch that the mesh does not divide.
        ShardingError: the mesh is none, or rules do not fit.
        UnsupportedError: the mesh has more devices than can be simulated.
        TypeError: the class cannot be built from a config alone.
    """
    cls, config = resolve(model, config)
    remat = config.gradient_checkpointing if remat is None else remat
    policies = _known(remat, policies)
    mesh = parse_mesh(mesh) if isinstance(mesh, str) else placing.mesh_of(config, mesh)
    setup = Setup(
        cls=cls,
        config=_compiled_here(config, mesh),
        mesh=mesh,
        rules=rules,
        tx=as_optimizer(optimizer),
        batch=batch,
        batch_size=default_batch_size(mesh) if batch_size is None else batch_size,
        sequence_length=default_sequence_length(config) if sequence_length is None else sequence_length,
        dtype=floating(dtype, "dtype"),
        param_dtype=floating(param_dtype, "param_dtype"),
    )
    return plans(setup, policies, scan_layers, cache_length)[remat]


def plans(setup: Setup, policies: Sequence[str], scan_layers: bool | None, cache_length: int | None) -> dict[str, Plan]:
    """Return remat policy → plan, all of one mesh; see `plan_training`."""
    check_divides(setup.batch_size, setup.sequence_length, setup.mesh)
    setup = replace(setup, mesh=simulated_mesh(setup.mesh))
    scan = scans(setup, scan_layers)
    compiled = measure(setup, policies, scan=scan)
    step = Step(setup, setup.config_with(scan_layers=True))
    held = _held(step, compiled, cache_length or setup.sequence_length, setup.batch_size)
    flops, parameters, notes = _flops(setup, compiled), count(step.arguments.params), _notes(setup, step.module, scan)
    return {
        policy: Plan(
            model=setup.cls.__name__,
            axes=dict(setup.mesh.shape),
            batch_size=setup.batch_size,
            sequence_length=setup.sequence_length,
            dtype=jnp.dtype(setup.dtype).name,
            param_dtype=jnp.dtype(setup.param_dtype).name,
            remat=policy,
            scan_layers=scan,
            parameters=parameters,
            bytes_per_device=held,
            flops_per_step=flops,
            collective_bytes_per_step=_by_kind(compiled[policy].moved),
            notes=notes,
        )
        for policy in policies
    }


def _by_kind(moved: Moved) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (kind, axes), size in sorted(moved.items()):
        found.setdefault(kind, {})[axes] = size
    return found


def resolve(model: Any, config: Any = None) -> tuple[Any, Any]:
    """Return class and config of what a plan is asked for.

    Raises:
        TypeError: a class without a config, or something else altogether.
    """
    if inspect.isclass(model):
        if not issubclass(model, EasyDeLBaseModule):
            raise TypeError(f"{model.__name__} cannot be planned: expected a subclass of EasyDeLBaseModule")
        if config is None:
            raise TypeError(f"a plan of the class {model.__name__} needs its config: plan_training(cls, mesh, config)")
        return model, config
    if config is not None:
        raise TypeError(f"config= goes with a class, got {type(model).__name__}: it has its own")
    config = read_config(str(model)) if isinstance(model, str | Path) else model
    if not hasattr(config, "gradient_checkpointing"):
        raise TypeError(f"expected a folder, a Hub id, a config or a class with its config, got {type(model).__name__}")
    return model_class(config), config


def as_optimizer(optimizer: Any) -> optax.GradientTransformation:
    """Return one of optax's optimizers, given as such or by name.

    Raises:
        ValueError: an unknown name.
        TypeError: neither.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {optimizer!r} is not known by name; choose from {', '.join(OPTIMIZERS)}")
        return OPTIMIZERS[optimizer](1e-4)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer: expected a name or an optax optimizer, got {type(optimizer).__name__}")
    return optimizer


def floating(dtype: Any, name: str) -> Any:
    """Return a floating-point dtype given as such or by name.

    Raises:
        ValueError: it is none.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{name}={dtype!r}: expected a floating-point type such as float32 or bfloat16")
    return found


def default_batch_size(mesh: AnyMesh) -> int:
    """Return one row for each part that a mesh splits a batch into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in ROLES["batch"])


def default_sequence_length(config: Any) -> int:
    """Return 4096, or how many positions a model has if that is less."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH)


def _known(remat: str, policies: Sequence[str]) -> list[str]:
    wanted = {remat, *policies}
    if unknown := wanted - {*REMAT_POLICIES}:
        raise ValueError(f"remat policy {sorted(unknown)} is not known; choose from {', '.join(REMAT_POLICIES)}")
    return [policy for policy in REMAT_POLICIES if policy in wanted]


def _compiled_here(config: Any, mesh: AnyMesh) -> Any:
    """Return a config whose step can be compiled for CPUs: on a GPU `"auto"` may choose a kernel that only GPUs have.

    Such a kernel keeps no products of queries and keys; neither does blockwise attention keep those it need not.
    """
    mechanism = getattr(config, "attn_mechanism", None)
    goes_round = mechanism == "auto" and mesh.shape.get("sp", 1) > 1
    if jax.default_backend() == "cpu" or mechanism not in ("auto", "sdpa") or goes_round:
        return config
    config = copy.deepcopy(config)
    config.attn_mechanism = "blockwise"
    return config


def _held(step: Step, compiled: Mapping[str, Measured], cache_length: int, batch_size: int) -> dict[str, Any]:
    given = step.arguments
    fixed = {
        "parameters": bytes_per_device(given.params),
        "optimizer": bytes_per_device(given.opt_state),
        "inputs": bytes_per_device((given.other, given.batch)),
    }
    # XLA may update a parameter as soon as its gradient is there, and then never holds all of them.
    gradients = min(fixed["parameters"], *(found.temporaries for found in compiled.values()))
    activations = {policy: found.temporaries - gradients for policy, found in compiled.items()}
    stay = sum(fixed.values()) + gradients
    return {
        "parameters": fixed["parameters"],
        "gradients": gradients,
        "optimizer": fixed["optimizer"],
        "inputs": fixed["inputs"],
        "activations": activations,
        "cache": cache_bytes(step, batch_size, cache_length),
        "total": {policy: stay + size for policy, size in activations.items()},
    }


def _flops(setup: Setup, compiled: Mapping[str, Measured]) -> dict[str, Any]:
    plain = setup.config_with(scan_layers=True, gradient_checkpointing="none")
    forward = forward_flops(setup, plain)
    total = {
        policy: step_flops(setup, setup.config_with(scan_layers=True, gradient_checkpointing=policy), found.traced)
        for policy, found in compiled.items()
    }
    least = total["none"] if "none" in total else step_flops(setup, plain)
    return {
        "forward": forward,
        "backward": least - forward,
        "recomputation": {policy: count - least for policy, count in total.items()},
        "total": total,
    }


def _notes(setup: Setup, module: Any, scan: bool) -> tuple[str, ...]:
    notes = []
    if scan and not getattr(setup.config, "scan_layers", False):
        notes.append("planned with scan_layers=True: this many layers one by one take too long to compile")
    if not has_loss(module) and module.model_task != "base":
        notes.append("the task has no loss: planned with the mean square of what the model gives back")
    return tuple(notes)
