"""`EasyDeLBaseModule`: the front door. Each method opens onto a room that does the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from easydel.calls import takes
from easydel.infra import adapting, creation, flops, forward, functional, parts, placing, resizing, views
from easydel.infra.mixins.bridge import EasyBridgeMixin
from easydel.infra.mixins.generation import EasyGenerationMixin
from easydel.infra.mixins.operation_cache import OperationCacheMixin
from easydel.lora import DEFAULT, FoldReport, LoraConfig, fold, named, trees
from easydel.loss import LossConfig, task_loss
from easydel.paths import detached, flatten, named_modules, nest, split
from easydel.quantization import QuantizationReport, dequantize_module, quantize_module, report_of
from easydel.sharding import (
    AnyMesh,
    PartitionRules,
    ShardingExplanation,
    check_mesh,
    gather,
    place,
)

if TYPE_CHECKING:
    import optax

    from easydel.infra.base_state import EasyDeLState

Tree = dict[str, Any]


class EasyDeLBaseModule(nnx.Module, EasyGenerationMixin, EasyBridgeMixin, OperationCacheMixin):
    """Base class of all models: a plain `nnx.Module` with a config.

    Subclass it, call `super().__init__`, build layers (ours or plain `nnx` ones) and define `__call__`.
    Verbs change the model in place and return it; a verb that fails leaves it as it was.

    Args:
        config: the model's config.
        dtype: computations are done in it.
        param_dtype: parameters are stored in it.
        precision: of matrix products (`jax.lax.Precision`); `None` is JAX's default.
        rngs: keys for initialisation and dropout.
    """

    config_class: ClassVar[type | None] = None
    model_task: ClassVar[str] = "base"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            cls.__call__ = forward.front_door(cls.__call__)  # type: ignore[method-assign]

    def __init__(
        self,
        config: Any,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        del rngs  # keys belong to the layers that use them
        self.config = config
        self.dtype = jnp.dtype(dtype or jnp.float32)
        self.param_dtype = jnp.dtype(param_dtype or jnp.float32)
        self.precision = precision
        self.last_mesh: AnyMesh | None = None
        self.is_sharded = False
        self.placement: placing.Placement | None = None

    def _snapshot(self) -> None:
        """Note what the config says now, as part of the module's static structure.

        JAX remembers compiled functions by that structure, and there the config is equal to itself whatever has been
        changed in it since. The note differs, so that a changed config never meets a program made for the old one.
        """
        content = getattr(self.config, "content", None)
        if content is not None:
            object.__setattr__(self, "_config_content", content())

    def _graph_node_flatten(self) -> Any:
        self._snapshot()
        return super()._graph_node_flatten()

    def _pytree__flatten(self) -> Any:
        self._snapshot()
        return super()._pytree__flatten()

    def _pytree__flatten_with_paths(self) -> Any:
        self._snapshot()
        return super()._pytree__flatten_with_paths()

    # ------------------------------------------------------------------ identity
    @property
    def model_type(self) -> str:
        """Name of the architecture, such as `"llama"`."""
        return getattr(self.config, "model_type", "")

    @property
    def mesh(self) -> Mesh:
        """The mesh the model was last sharded on, else the config's."""
        return self.config.mesh if self.last_mesh is None else self.last_mesh  # type: ignore[return-value]

    @property
    def module_dtype(self) -> jnp.dtype:
        """Storage dtype of the first floating-point parameter."""
        floats = views.param_arrays(self).values()
        return next((jnp.dtype(value.dtype) for value in floats if views.is_float(value)), self.param_dtype)

    @property
    def is_quantized(self) -> bool:
        """Whether any layer holds quantized weights."""
        return any(
            getattr(layer, "is_quantized_layer", False) for layer in named_modules(self, by_layer=False).values()
        )

    @property
    def lora_is_enabled(self) -> bool:
        """Whether any layer carries a LoRA adapter."""
        return bool(trees.lora_paths(self))

    # ------------------------------------------------------------------ parameters
    @property
    def params(self) -> Tree:
        """Nested dict of the parameters, as they are (no copies); of stacked layers, `easydel.stacked.Layers`."""
        return nest(views.param_arrays(self))

    @property
    def graphtree_params_shape(self) -> Tree:
        """The tree of `params` with `jax.ShapeDtypeStruct` leaves."""
        return nest({path: views.abstract(array) for path, array in views.param_arrays(self).items()})

    def split_params_dict(self) -> Tree:
        """Return the parameters as a nested dict of arrays."""
        return self.params

    def split_params(self) -> nnx.State:
        """Return the parameters as an `nnx.State`."""
        return split(self)[1]

    def merge_params_dict(self, params_dict: Mapping[str, Any]) -> Self:
        """Put a nested dict of parameters in place; it may be partial.

        Raises:
            ValueError: a path the model lacks, or a wrong shape; nothing is changed then.
        """
        views.merge_params(self, params_dict)
        return self

    def merge_params(self, params_state: nnx.State) -> Self:
        """Put an `nnx.State` of parameters in place; it may be partial. Raises as `merge_params_dict`."""
        views.merge_params(self, params_state)
        return self

    # ------------------------------------------------------------------ graph
    @property
    def graphdef(self) -> Any:
        """The model's structure, without its variables."""
        return nnx.split(self)[0]

    @property
    def graphstate(self) -> nnx.State:
        """All variables: parameters and other state."""
        return detached(nnx.state(self))

    @property
    def graphother(self) -> nnx.State:
        """Everything that is no parameter."""
        return split(self)[2]

    def split_module(self) -> tuple[Any, nnx.State]:
        """Return `(graphdef, state)`."""
        graphdef, state = nnx.split(self)
        return graphdef, detached(state)

    @staticmethod
    def merge_module(graphdef: Any, state: nnx.State) -> Any:
        """Return a new module from what `split_module` gave."""
        return nnx.merge(graphdef, state, copy=True)

    # ------------------------------------------------------------------ sharding
    def shard_model(
        self, partition_rules: PartitionRules | None = None, mesh: Mesh | None = None, *, strict: bool = False
    ) -> Self:
        """Place every variable on a mesh by partition rules.

        Args:
            partition_rules: `(regex, PartitionSpec)` pairs, the config's if `None`.
            mesh: the config's if `None`.
            strict: raise where a mesh axis does not divide a dimension, instead of dropping the axis with a warning.

        Raises:
            ShardingError: the rules do not fit the parameters or the mesh.
        """
        mesh = self.config.mesh if mesh is None else mesh
        rules = self._get_partition_rules() if partition_rules is None else partition_rules
        return self._place(placing.module_shardings(self, rules, mesh, strict=strict), mesh)

    def explain_sharding(
        self, rules: PartitionRules | None = None, mesh: AnyMesh | Mapping[str, int] | None = None
    ) -> ShardingExplanation:
        """Say what `shard_model(rules, mesh)` makes of every parameter, and why; nothing is allocated or moved.

        Args:
            rules: `(regex, PartitionSpec)` pairs, the rules in force if `None`.
            mesh: also one that is not here, as an `AbstractMesh` or sizes (`{"fsdp": 64, "tp": 8}`); `model.mesh` if
                `None`.

        Raises:
            ShardingError: the rules do not fit the parameters or the mesh.
        """
        return placing.explain(self, rules, mesh)

    @classmethod
    def lazy_init(cls, config: Any, mesh: Any = None, rules: PartitionRules | None = None, **options: Any) -> Self:
        """Build a model of shapes and shardings only, before any memory is taken.

        Whatever needs no numbers works: `graphtree_params_shape`, `explain_sharding`, `flops_per_token`, `shard_model`.
        A forward pass raises.

        Args:
            config: the model's config.
            mesh: also one that is not here, as for `explain_sharding`; the config's if `None`.
            rules: `(regex, PartitionSpec)` pairs, those of the config or inferred ones if `None`.
            **options: `dtype`, `param_dtype` and `precision` as in the constructor; `strict` as for `shard_model`.

        Raises:
            ShardingError: the rules do not fit the parameters or the mesh.
        """
        return creation.lazy_module(cls, config, mesh, rules, **options)

    @classmethod
    def sharded_init(
        cls,
        config: Any,
        mesh: Mesh | None = None,
        rules: PartitionRules | None = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> Self:
        """Build a model straight onto a mesh, each device making its own part.

        The numbers are those of `cls(config, rngs=rngs)`, bit by bit, whatever the mesh, random states included.

        Args:
            config: the model's config.
            mesh: the config's if `None`.
            rules: `(regex, PartitionSpec)` pairs, those of the config or inferred ones if `None`.
            rngs: keys for initialisation and dropout, `nnx.Rngs(0)` if `None`; they count on as in the constructor.
            **options: `dtype`, `param_dtype` and `precision` as in the constructor; `strict` as for `shard_model`.

        Raises:
            ShardingError: the rules do not fit the parameters or the mesh.
        """
        return creation.sharded_module(cls, config, mesh, rules, rngs, **options)

    def fully_shard(self, mesh: Mesh | None = None) -> Self:
        """Split every parameter over all devices of the mesh, along its largest divisible dimension."""
        mesh = self.mesh if mesh is None else mesh
        return self._place(placing.spread_shardings(self, mesh), mesh)

    def gather_model(self) -> Self:
        """Bring every array whole onto one device of this process."""
        placing.apply_to_arrays(self, lambda _, array: gather(array))
        return self._mark_sharded(None)

    def fully_gather(self, mesh: Mesh | None = None) -> Self:
        """Replicate every parameter over the mesh, then hold it on a single device."""
        mesh = self.mesh if mesh is None else mesh
        check_mesh(mesh, devices=True)
        everywhere = jax.sharding.NamedSharding(mesh, PartitionSpec())
        placing.apply_to_arrays(self, lambda _, array: gather(place(array, everywhere)))
        return self._mark_sharded(None)

    def _place(self, shardings: Mapping[str, Any], mesh: AnyMesh) -> Self:
        placing.apply_to_arrays(self, lambda path, array: place(array, shardings[path]))
        return self._mark_sharded(mesh)

    def _mark_sharded(self, mesh: AnyMesh | None) -> Self:
        for module in named_modules(self, by_layer=False).values():
            if isinstance(module, EasyDeLBaseModule):
                module.is_sharded = isinstance(mesh, Mesh)
                module.last_mesh = module.last_mesh if mesh is None else mesh
                module.placement = placing.Placement.of(module) if module.is_sharded else None
        return self

    def _get_partition_rules(self) -> PartitionRules:
        return placing.rules_in_force(self)

    def _specs_sharding(self, partition_rules: PartitionRules | None = None) -> Tree:
        rules = self._get_partition_rules() if partition_rules is None else partition_rules
        return nest(placing.param_specs(self, rules))

    def _named_shardings(self, partition_rules: PartitionRules | None = None, mesh: Mesh | None = None) -> Tree:
        rules = self._get_partition_rules() if partition_rules is None else partition_rules
        return nest(placing.param_shardings(self, rules, self.mesh if mesh is None else mesh))

    def _shard_fns(self, partition_rules: PartitionRules | None = None, mesh: Mesh | None = None) -> Tree:
        return nest(placing.placers(flatten(self._named_shardings(partition_rules, mesh), by_layer=False)))

    def _gather_fns(self, partition_rules: PartitionRules | None = None, mesh: Mesh | None = None) -> Tree:
        checked = flatten(self._named_shardings(partition_rules, mesh), by_layer=False)
        return nest(dict.fromkeys(checked, gather))

    def _apply_sharding_fns(
        self,
        tree: Any,
        partition_rules: PartitionRules | None = None,
        mesh: Mesh | None = None,
        is_gather: bool = False,
    ) -> Any:
        rules = self._get_partition_rules() if partition_rules is None else partition_rules
        return placing.apply_to_tree(self, tree, rules, self.mesh if mesh is None else mesh, is_gather=is_gather)

    # ------------------------------------------------------------------ dtype
    def to_dtype(self, dtype: Any) -> Self:
        """Store floating-point parameters in `dtype` and compute in it; integers and quantized codes stay."""
        views.cast(self, dtype)
        return self

    def half(self) -> Self:
        """Convert to float16."""
        return self.to_dtype(jnp.float16)

    # ------------------------------------------------------------------ quantization
    def quantize(
        self,
        method: str = "nf4",
        group_size: int = 64,
        quantization_pattern: str = ".*",
        *,
        calibration: Sequence[Any] | None = None,
    ) -> Self:
        """Store the weights of linear layers and experts as integer codes.

        Embeddings, norms, routers and heads tied to an embedding stay as they are. What was done is told by
        `quantization_report`.

        Args:
            method: `"nf4"`, `"8bit"`, `"a8bit"`, `"a8q"` or `"a4q"`.
            group_size: inputs that share a scale.
            quantization_pattern: regular expression on module paths, such as `".*mlp.*"`.
            calibration: for `"a8bit"`, batches of token ids `[batch, seq]` or of forward arguments.

        Raises:
            ValueError: an unknown method, a group size that is no positive integer, a pattern that matches no linear
                layer, weights that are not finite, or a model that is quantized already.
            UnsupportedError: a layer that cannot be quantized by this method.
        """
        trees.refuse_adapters(self, "quantize", "quantize before applying adapters, or merge_and_unload() first")
        quantize_module(self, method, group_size, quantization_pattern, calibration)
        return self._mark_sharded(self.last_mesh) if self.is_sharded else self

    def dequantize(self) -> Self:
        """Store quantized weights as floats again, in the dtype they had: the values their codes stand for.

        Raises:
            ValueError: the model is not quantized.
        """
        trees.refuse_adapters(self, "dequantize", "merge_and_unload() or delete_adapter() first")
        dequantize_module(self)
        return self._mark_sharded(self.last_mesh) if self.is_sharded else self

    @property
    def quantization_report(self) -> QuantizationReport | None:
        """Layers, bytes before and after, and the error of each layer; `None` if nothing is quantized."""
        return report_of(self)

    # ------------------------------------------------------------------ LoRA
    def apply_lora_to_layers(
        self,
        lora_rank: int = 8,
        lora_alpha: Any = 16,
        lora_pattern: str | None = None,
        *,
        lora_dropout: Any = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, Any] | None = None,
        embeddings: bool = False,
        rngs: nnx.Rngs | None = None,
        adapter_name: str = DEFAULT,
    ) -> Self:
        """Give layers low-rank adapters, which change nothing until they are trained.

        Args:
            lora_rank: of the adapters.
            lora_alpha: their products are multiplied by `lora_alpha / lora_rank`.
            lora_pattern: regular expression on module paths; `None`: all linear layers and experts but the head.
            lora_dropout: rate, of the adapters' inputs in training.
            use_rslora: multiply by `lora_alpha / sqrt(lora_rank)`.
            use_dora: learn the magnitude of each output's weights apart.
            rank_pattern: regular expression on module paths → rank of those layers.
            alpha_pattern: regular expression on module paths → alpha of those layers.
            embeddings: whether the pattern chooses embeddings, too.
            rngs: for initial numbers and dropout, `nnx.Rngs(0)` if `None`.
            adapter_name: what the adapter is called.

        Raises:
            ValueError: a model with adapters, a pattern that matches no linear layer (the nearest are named), a rank
                below 1, or another value out of range.
            UnsupportedError: an adapter that there is not, such as one with dropout for experts.
        """
        config = LoraConfig(
            rank=lora_rank,
            alpha=lora_alpha,
            pattern=lora_pattern,
            dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
            embeddings=embeddings,
        )
        adapting.apply(self, adapter_name, config, rngs)
        return self

    def split_lora_params(self) -> tuple[Tree, Tree]:
        """Return `(base_params, lora_params)`, two nested dicts; the arrays are the model's, which keeps its adapters.

        Raises:
            ValueError: the model has no adapters.
        """
        return trees.split(self)

    def merge_lora_params(self, lora_params: Mapping[str, Any] | nnx.State | None = None) -> Self:
        """Put parameters of adapters in place, a (partial) tree as `split_lora_params` gives it; nothing is folded.

        Raises:
            ValueError: the model has no adapters, paths that are none of theirs, or a wrong shape.
        """
        trees.check_lora_tree(self, {} if lora_params is None else lora_params)
        if lora_params is not None:
            views.merge_params(self, lora_params)
        return self

    def unwrap_lora_to_layers(self) -> Self:
        """Fold the active adapter into the weights, in float32, and remove all adapters.

        Quantized weights are dequantized and quantized anew; a warning and `lora_fold_report` tell the error that adds.

        Raises:
            ValueError: the model has no adapters, disabled ones, or ones that are not finite.
        """
        fold.unwrap(self)
        named.forget_all(self)
        return self

    def merge_and_unload(self) -> Self:
        """Do what `unwrap_lora_to_layers` does, by PEFT's name."""
        return self.unwrap_lora_to_layers()

    def merge_adapter(self) -> Self:
        """Fold the active adapter into the weights, keeping it and the weights that were there.

        Raises:
            ValueError: as `unwrap_lora_to_layers`, or the adapters are merged already.
        """
        fold.merge(self)
        return self

    def unmerge_adapter(self) -> Self:
        """Put back the weights from before `merge_adapter`, bit by bit.

        Raises:
            ValueError: the adapters are not merged, or the model is a copy of the one that was.
        """
        fold.unmerge(self)
        return self

    @property
    def lora_fold_report(self) -> FoldReport | None:
        """What folding last added to the error of quantized weights; `None` if it folded into none."""
        return fold.fold_report(self)

    def add_adapter(self, adapter_name: str, config: LoraConfig | None = None, *, rngs: nnx.Rngs | None = None) -> Self:
        """Give the model another adapter; the first one is active at once, later ones wait for `set_adapter`.

        Adapters that are not active belong to this object: copies and states carry the active one.

        Args:
            adapter_name: what it is called.
            config: of it, `LoraConfig()` if `None`.
            rngs: for initial numbers and dropout, `nnx.Rngs(0)` if `None`.

        Raises:
            ValueError: there is one of this name; else as `apply_lora_to_layers`.
        """
        adapting.add(self, adapter_name, LoraConfig() if config is None else config, rngs)
        return self

    def set_adapter(self, adapter_name: str) -> Self:
        """Exchange the active adapter; between adapters of the same layers and ranks nothing is compiled anew.

        Raises:
            ValueError: there is none of this name, or the adapters are merged or disabled.
        """
        named.set_adapter(self, adapter_name)
        return self._mark_sharded(self.last_mesh) if self.is_sharded else self

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters, the active one first."""
        return named.adapter_names(self)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that the layers carry; `None` if they carry none."""
        return named.active_adapter(self)

    def delete_adapter(self, adapter_name: str) -> Self:
        """Forget an adapter without folding it; the active one only if there is no other.

        Raises:
            ValueError: there is none of this name, or it is active beside others.
        """
        named.delete_adapter(self, adapter_name)
        return self._mark_sharded(self.last_mesh) if self.is_sharded else self

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[Any],
        adapter_name: str,
        combination_type: str = "svd",
        *,
        svd_rank: int | None = None,
    ) -> Self:
        """Put a weighted sum of adapters beside them; `set_adapter` makes it the active one.

        Args:
            adapters: their names.
            weights: of each.
            adapter_name: of the new one.
            combination_type: `"cat"` is exact (the ranks add up), `"svd"` the best of a rank, `"linear"` sums `A` and
                `B` apart, as PEFT does.
            svd_rank: for `"svd"`, the largest of the adapters' if `None`.

        Raises:
            ValueError: names or weights that do not fit.
            UnsupportedError: another combination, or adapters with DoRA.
        """
        adapting.add_weighted(self, adapters, weights, combination_type, adapter_name, svd_rank)
        return self

    def disable_adapters(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes without its adapters.

        Raises:
            ValueError: on entering it, if the model has no adapters, or merged ones.
        """
        return named.disabled(self)

    # ------------------------------------------------------------------ parts
    def get_embedding(self) -> nnx.Embed:
        """Return the embedding of input tokens; `ValueError` if there is none, or several that could be meant."""
        return parts.token_embedding(self)

    def get_lm_head(self) -> nnx.Module | None:
        """Return the layer that makes logits: the embedding if the head is tied, `None` if there is no such layer."""
        return parts.lm_head(self)

    def get_encoder(self) -> nnx.Module:
        """Return the encoder, the whole backbone of an encoder-only model; `UnsupportedError` for a decoder."""
        return parts.encoder(self)

    def get_decoder(self) -> nnx.Module:
        """Return the decoder, the whole backbone of a decoder-only model; `UnsupportedError` for an encoder."""
        return parts.decoder(self)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Self:
        """Change the size of the vocabulary: embedding, head, their biases and `config.vocab_size`.

        Unlike in transformers the model is returned, not the embedding: `get_embedding` has that. `model.config` is
        then a changed copy; states and other models made from the old one keep it.

        Args:
            new_num_tokens: tokens to have; those kept stay as they are, bit by bit. `None`: as many as now.
            pad_to_multiple_of: round the number up to a multiple of this.
            mean_resizing: draw new vectors from the old ones' mean and (hardly any of) their covariance, else as
                the model's class initialises them.
            rngs: keys for new vectors, `nnx.Rngs(0)` if `None`.

        Raises:
            ValueError: a number that is no positive integer, a model without an embedding, special tokens that would
                fall outside, or a table whose size is not the config's.
            UnsupportedError: adapters or quantization have changed a layer to be resized.
        """
        resizing.resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing, rngs)
        return self

    # ------------------------------------------------------------------ forward
    def compute_loss(
        self, *, labels: Any, logits: Any = None, config: LossConfig | None = None, **inputs: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Compute the task's loss.

        Args:
            labels: as the task takes them; -100 masks a label.
            logits: compared with the labels; if `None`, a forward pass with `inputs` makes them.
            config: how the loss is computed.
            **inputs: arguments of the forward pass, only without `logits`.

        Returns:
            The loss, float32 `[]`, and a mapping of metrics (`loss`, `accuracy`, `num_tokens`, …). A balancing loss of
            experts needs the forward pass: with `logits` there is none.
        """
        if logits is not None:
            if inputs:
                unused = ", ".join(inputs)
                raise TypeError(f"compute_loss with logits runs no forward pass: {unused} would have no effect")
            return task_loss(self.model_task, logits, labels, config, self.config)
        if config is not None and takes(self, "loss_config"):
            inputs["loss_config"] = config
        outputs = self(**self.prepare_inputs_for_call(**inputs))
        return forward.loss_of(self, outputs, labels, config)

    def get_static_arguments(self) -> tuple[str, ...]:
        """Return the names of the forward arguments that must be static under `jax.jit`."""
        return forward.static_arguments(self)

    def prepare_inputs_for_call(self, **inputs: Any) -> dict[str, Any]:
        """Return the inputs as the forward pass takes them: arrays made, static ones checked, unknown names refused."""
        return forward.prepare_inputs(self, inputs)

    def pure_transform_fn(self) -> Callable[..., Any]:
        """Return `fn(params, inputs, rngs=None, **static) -> outputs`: pure, for `jax.jit` and `jax.grad`.

        `params` is a tree like `model.params`, `inputs` a mapping of forward arguments; those named by
        `get_static_arguments` go by keyword (`jax.jit(fn, static_argnames=model.get_static_arguments())`).
        """
        return functional.pure_function(self)

    def flops_per_token(self, batch_size: int = 1, sequence_length: int = 1) -> float:
        """Return the forward pass's FLOPs per token (matrix products; causal halving not counted)."""
        return self._flop(self.config, batch_size, sequence_length) / (batch_size * sequence_length)

    def _flop(self, config: Any, batch_size: int, sequence_length: int) -> int:
        return flops.forward_flops(type(self), config, batch_size, sequence_length)

    def to_state(
        self,
        optimizer: optax.GradientTransformation,
        *,
        trainable: str | Sequence[str] | None = None,
        frozen: str | Sequence[str] | None = None,
    ) -> EasyDeLState:
        """Return a training state: parameters, optimizer state and step counter.

        Args:
            optimizer: from optax; it sees the trained parameters only.
            trainable: regular expressions on parameter paths; what none is found in is frozen. `None`: all are trained,
                of a model with adapters those.
            frozen: regular expressions on parameter paths; what one is found in is frozen. Give one of the two.

        Raises:
            ValueError: a pattern matches nothing, nothing is left to train, or adapters are merged or disabled.
        """
        from easydel.infra.base_state import EasyDeLState

        return EasyDeLState.create(self, optimizer, trainable=trainable, frozen=frozen)

    def float(self) -> Self:  # last: in the class body, `float` means this method from here on
        """Convert to float32."""
        return self.to_dtype(jnp.float32)
