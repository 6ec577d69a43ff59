"""`EasyDeLBaseConfig`: transformers' config plus this library's runtime settings."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Hashable, Mapping
from typing import Any, ClassVar

import numpy as np
from huggingface_hub.dataclasses import strict
from jax.sharding import Mesh
from transformers.configuration_utils import PreTrainedConfig

from easydel.sharding import AXIS_NAMES, DEFAULT_AXIS_DIMS, PartitionRules, create_mesh

REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch")
ATTENTION_MECHANISMS = ("auto", "vanilla", "sdpa", "blockwise", "ring")
MOE_MECHANISMS = ("auto", "grouped", "ragged", "blocks")

_ORIGIN = ("_name_or_path", "source_directory", "architectures", "dtype", "transformers_version", "model_type")

_build_mesh = functools.lru_cache(maxsize=64)(create_mesh)


def _freeze(value: Any) -> Any:
    """Turn a config value into something hashable that is equal exactly when the values are."""
    if isinstance(value, EasyDeLBaseConfig):
        return type(value), value.content()
    if isinstance(value, PreTrainedConfig):
        return type(value), _freeze(value.to_dict())
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _freeze(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return (list, tuple(_freeze(item) for item in value))
    if isinstance(value, set | frozenset):
        return frozenset(_freeze(item) for item in value)
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    # 1, 1.0 and True are equal and hash alike in Python, but they trace differently.
    hashable = isinstance(value, Hashable)
    return type(value).__name__, value if hashable else json.dumps(value, default=repr, sort_keys=True)


class EasyDeLBaseConfig(PreTrainedConfig):
    """Configuration of an `EasyDeLBaseModule`, understood by transformers.

    Subclass it with a classic `__init__` or with annotated fields; a family's config also subclasses
    transformers' own (`class LlamaConfig(EasyDeLBaseConfig, transformers.LlamaConfig)`).

    The fields below say how a model runs *here*; they are keyword arguments and attributes like any
    other, but are never written to `config.json`.

    Attributes:
        sharding_axis_dims: sizes of the mesh axes; one may be `-1` (inferred).
        sharding_axis_names: names of the mesh axes, in the same order.
        sharding_dcn_axis_dims: over how many TPU slices, elsewhere processes, each axis goes; one may be `-1`. `None`:
            the first axes that divide by their number go from one to the next.
        attn_mechanism: `"auto"`, `"vanilla"`, `"sdpa"`, `"blockwise"` or `"ring"` (over `sp`).
        attn_block_size: queries per block of the blockwise mechanism.
        moe_mechanism: how experts are computed: `"ragged"` (XLA's grouped product), `"grouped"` (a C++ kernel for
            CPUs), `"blocks"` (the rows of each expert in turn) or `"auto"` (on a CPU the second, without it the third).
        gradient_checkpointing: what a block keeps for its backward pass: `"none"` (no rematerialisation), `"full"`
            (only its input), `"dots"` (matrix products), `"dots_no_batch"` (matrix products with weights).
        scan_layers: whether equal layers are stored stacked and run by a scan, so that a block is compiled once however
            many there are. Paths, files and results do not change.
    """

    source_directory: ClassVar[str | None] = None
    """Where the config was loaded from; it belongs neither to the content nor to the file."""

    runtime_fields: ClassVar[tuple[str, ...]] = (
        "sharding_axis_dims",
        "sharding_axis_names",
        "sharding_dcn_axis_dims",
        "attn_mechanism",
        "attn_block_size",
        "moe_mechanism",
        "gradient_checkpointing",
        "scan_layers",
    )

    sharding_axis_dims: list[int] | tuple[int, ...] = DEFAULT_AXIS_DIMS
    sharding_axis_names: list[str] | tuple[str, ...] = AXIS_NAMES
    sharding_dcn_axis_dims: list[int] | tuple[int, ...] | None = None
    attn_mechanism: str = "auto"
    attn_block_size: int = 128
    moe_mechanism: str = "auto"
    gradient_checkpointing: str = "none"
    scan_layers: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # transformers makes each subclass a dataclass: that compares annotated fields only, and takes `__hash__`
        # away. A model whose config changed would then reuse a stale trace.
        cls.__eq__ = EasyDeLBaseConfig.__eq__  # type: ignore[method-assign]
        cls.__hash__ = EasyDeLBaseConfig.__hash__  # type: ignore[method-assign]
        strict(cls)

    def content(self) -> tuple[Any, ...]:
        """Return everything the config says of the model, frozen: equal configs give equal, hashable contents.

        Where a config comes from and how its file was written (`_ORIGIN`) says nothing of the model: one that was
        saved and loaded equals the one it was made from, and shares its compiled programs.
        """
        return _freeze({key: value for key, value in self.__dict__.items() if key not in _ORIGIN})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.content() == other.content()

    def __hash__(self) -> int:
        return hash((type(self), self.content()))

    def validate_runtime_settings(self) -> None:
        """Check the runtime settings (called by transformers after construction)."""
        for name, value, known in (
            ("attn_mechanism", self.attn_mechanism, ATTENTION_MECHANISMS),
            ("moe_mechanism", self.moe_mechanism, MOE_MECHANISMS),
            ("gradient_checkpointing", self.gradient_checkpointing, REMAT_POLICIES),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not supported; choose one of {', '.join(known)}")
        if self.attn_block_size < 1:
            raise ValueError(f"attn_block_size must be positive, got {self.attn_block_size}")

    @property
    def mesh(self) -> Mesh:
        """The mesh of `sharding_axis_dims` over all devices, built once."""
        over = self.sharding_dcn_axis_dims
        dims, names = tuple(self.sharding_axis_dims), tuple(self.sharding_axis_names)
        return _build_mesh(dims, names, dcn_axis_dims=None if over is None else tuple(over))

    def get_partition_rules(self) -> PartitionRules | None:
        """Return `(regex, PartitionSpec)` rules for the parameters; `None` has them inferred from the layers."""
        return None

    def follow_tensors(self, names: Collection[str], given: Collection[str]) -> None:
        """Set the fields that a checkpoint answers by its tensors, not in `config.json`: here none.

        Args:
            names: of the checkpoint's tensors.
            given: fields that the caller set, which stay as they are.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return the Hugging Face fields as a dictionary that `json` can write (no runtime settings)."""
        hidden = {*self.runtime_fields, "source_directory"}
        return {key: value for key, value in super().to_dict().items() if key not in hidden}

    def runtime_settings(self) -> dict[str, Any]:
        """Return this library's own settings, those that `to_dict` leaves out."""
        return {name: getattr(self, name) for name in self.runtime_fields}
