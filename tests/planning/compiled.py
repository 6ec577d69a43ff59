"""The step one would write by hand, compiled for the simulated devices of the tests: what plans are held against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.sharding import create_mesh
from tests.sharding.held import zeros

# As users compile, not as `tests/conftest.py` and plans do: that machine code changes no buffer is part of the proof.
# It takes ten times as long, so that one test that is not slow does it.
AS_USUAL = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}


def mesh_of(**axes: int) -> Mesh:
    dims = tuple(axes.get(name, 1) for name in ("dp", "fsdp", "ep", "tp", "sp"))
    return create_mesh(dims, devices=jax.devices()[: int(np.prod(dims))])


def compiled_step(
    cls: Any,
    config: Any,
    mesh: Mesh,
    shapes: dict[str, tuple[int, ...]],
    optimizer: Any = None,
    *,
    as_usual: bool = False,
    **options: Any,
) -> Any:
    """Compile it for real, sharded arrays: nothing of `easydel.planning` has a part in it."""
    if config.scan_layers or options:
        model = cls.sharded_init(config, mesh, **options)
    else:  # nothing has to be compiled for these
        model = zeros(cls, config).shard_model(mesh=mesh)
    state = model.to_state(optax.adamw(1e-4) if optimizer is None else optimizer)
    batch = {}
    for name, shape in shapes.items():
        spec = PartitionSpec(("dp", "fsdp"), *("sp",) * (len(shape) > 1 and shape[1] % mesh.shape["sp"] == 0))
        batch[name] = jax.device_put(jnp.zeros(shape, jnp.int32), NamedSharding(mesh, spec))
    return jax.jit(_step, donate_argnums=0).lower(state, batch).compile(AS_USUAL if as_usual else None)


def _step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(lambda params: state.with_params(params).model(**batch).loss)(state.params)
    return state.apply_gradients(grads), loss


def bytes_of(compiled: Any) -> int:
    """Return what XLA lays out for a step: arguments (overwritten by the results) and everything else at its peak."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes
