"""The floating-point operations of a training step, counted from its traced program."""

from __future__ import annotations

import dataclasses
from typing import Any

from easydel.infra.flops import count_matmul_flops, inner_jaxprs
from easydel.planning.step import Setup, Step

_HIDING = frozenset(("shard_map", "while", "ffi_call"))
"""Primitives that hide how many products there are: parts of a mesh, loops of unknown length, kernels."""


def forward_flops(setup: Setup, config: Any) -> int:
    """Count the matrix products of a forward pass over the whole batch, on all devices together."""
    return _count(setup, config, lambda step: step.trace_forward(), None)


def step_flops(setup: Setup, config: Any, traced: Any | None = None) -> int:
    """Count those of a training step, given as traced (of this config), or traced anew."""
    return _count(setup, config, lambda step: step.trace(), traced)


def _count(setup: Setup, config: Any, trace: Any, traced: Any | None) -> int:
    jaxpr = (trace(Step(setup, config)) if traced is None else traced).jaxpr.jaxpr
    if _hides(jaxpr):
        whole = dataclasses.replace(setup, mesh=None)
        changes = {"moe_mechanism": "ragged"}
        if getattr(config, "attn_mechanism", None) == "ring":  # which needs the mesh
            changes["attn_mechanism"] = "auto"
        config = dataclasses.replace(whole, config=config).config_with(**changes)
        jaxpr = trace(Step(whole, config)).jaxpr.jaxpr
    return count_matmul_flops(jaxpr)


def _hides(jaxpr: Any) -> bool:
    return any(eqn.primitive.name in _HIDING or any(map(_hides, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)
