"""`EasyBridgeMixin`: files, the Hub and PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
from flax import nnx

from easydel.calls import refuse_shapes
from easydel.lora.trees import refuse_unfolded
from easydel.paths import named_variables

if TYPE_CHECKING:
    import torch

    from easydel.sharding import PartitionRules

PathLike = str | os.PathLike[str]


class EasyBridgeMixin:
    """Loads and saves Hugging Face checkpoints; torch is needed only by `to_torch`."""

    config: Any
    model_type: Any
    model_task: ClassVar[str]
    module_dtype: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *,
        config: Any = None,
        dtype: Any = None,
        param_dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        rngs: nnx.Rngs | None = None,
        auto_shard_model: bool = False,
        partition_rules: PartitionRules | None = None,
        mesh: jax.sharding.Mesh | None = None,
        strict: bool = False,
        allow_new: Sequence[str] = (),
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        progress: bool = True,
        quantization_method: str | None = None,
        quantization_group_size: int | None = None,
        quantization_pattern: str | None = None,
        quantization_calibration: Sequence[Any] | None = None,
        **config_fields: Any,
    ) -> Self:
        """Load a model from a local directory or a Hub id.

        Everything is checked before a tensor is read; each tensor is read straight to its place.

        Args:
            pretrained_model_name_or_path: a directory, or a Hub id such as `"org/name"`.
            config: used instead of the checkpoint's.
            dtype: computations are done in it; `None`: in the storage dtype.
            param_dtype: parameters are stored in it; `None`: in `dtype` if given, else as the checkpoint has them.
            precision: of matrix products.
            rngs: for parameters that the checkpoint lacks (`allow_new`).
            auto_shard_model: place parameters on the mesh by the partition rules (so do `partition_rules` and `mesh`).
            partition_rules: the config's, or inferred ones, if `None`.
            mesh: the config's if `None`.
            strict: raise where a mesh axis does not divide a dimension, instead of dropping the axis with a warning.
            allow_new: patterns of parameters that may be missing and are initialised, such as a new head's.
            revision: branch, tag or commit on the Hub.
            subfolder: directory inside the repository.
            token: for private repositories.
            cache_dir: where downloads are kept.
            local_files_only: use what is cached, without network.
            force_download: download again.
            progress: show a bar on long loads.
            quantization_method: quantize each kernel as it is read, so that the float model never exists whole; as
                `quantize` takes it. `"a8bit"` has to see the float model run: it is loaded whole, then quantized, each
                kernel freed as its codes are made. A checkpoint that is quantized is read as such without it.
            quantization_group_size: inputs that share a scale, 64 if `None`.
            quantization_pattern: regular expression on module paths, all linear layers and experts if `None`.
            quantization_calibration: batches for `"a8bit"`, as `quantize` takes them.
            **config_fields: fields of the config to override, such as `sharding_axis_dims=(1, 1, 1, -1, 1)`.

        Raises:
            CheckpointError: nothing there, broken files, or tensors that do not fit; all of these are listed together.
            ShardingError: the rules do not fit the parameters or the mesh.
            TypeError: a keyword that is neither an argument nor a field of the config.
            ValueError: a quantization that there is not, or a checkpoint that is quantized already.
        """
        from easydel.hub.resolve import resolve_checkpoint
        from easydel.infra.pretrained import load_pretrained
        from easydel.quantization.loading import load_quantization

        quantizer, finish = load_quantization(
            quantization_method, quantization_group_size, quantization_pattern, quantization_calibration
        )
        directory = resolve_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        model = load_pretrained(
            cls,
            directory,
            config=config,
            overrides=config_fields,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
            shard=auto_shard_model or partition_rules is not None or mesh is not None,
            partition_rules=partition_rules,
            mesh=mesh,
            strict=strict,
            allow_new=allow_new,
            progress=progress,
            quantizer=quantizer,
        )
        return finish(model)

    def save_pretrained(self, save_directory: PathLike, max_shard_size: str | int = "5GB") -> None:
        """Write the model in the Hugging Face layout, which transformers loads.

        Weights (safetensors), `config.json`, `generation_config.json`, and the tokenizer, processor and chat-template
        files of the directory the model was loaded from. A model already there is replaced all at once or not at all.

        Args:
            save_directory: a new or an existing directory.
            max_shard_size: largest size of a weight file, such as `"5GB"`, or bytes.

        Raises:
            CheckpointError: the path is a file, or the disk too full; nothing is changed then.
            ValueError: the model has adapters that are not folded into its weights.
        """
        from easydel.hub.save import save_module
        from easydel.infra.pretrained import rendered_files

        refuse_shapes(self, "save_pretrained")  # type: ignore[arg-type]
        refuse_unfolded(self, "save_pretrained")  # type: ignore[arg-type]
        source = getattr(self.config, "source_directory", None)
        save_module(
            self,  # type: ignore[arg-type]
            Path(save_directory),
            max_shard_size=max_shard_size,
            extra_files=rendered_files(self),
            source_dir=Path(source) if source else None,
        )

    def save_adapter(self, save_directory: PathLike, adapter_name: str | None = None) -> None:
        """Write an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads.

        An adapter already there is replaced all at once or not at all. Modules that are trained whole with it
        (`modules_to_save`) are written, too; nothing of the base is.

        Args:
            save_directory: a new or an existing directory.
            adapter_name: of the adapter, the active one if `None`.

        Raises:
            ValueError: the model has no such adapter.
            UnsupportedError: PEFT's files cannot hold it; the layers are named.
            CheckpointError: the path is a file, or the disk too full; nothing is changed then.
        """
        from easydel.infra import adapter_files

        adapter_files.save(self, Path(save_directory), adapter_name)

    def load_adapter(
        self,
        adapter_name_or_path: PathLike,
        adapter_name: str = "default",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Give the model an adapter that PEFT (or `save_adapter`) wrote; the first one is active at once.

        The config, the tensors and the model are checked against each other before anything is changed.

        Args:
            adapter_name_or_path: a directory, or a Hub id such as `"org/name"`.
            adapter_name: what the adapter is called here.
            revision: branch, tag or commit on the Hub.
            subfolder: directory inside the repository.
            token: for private repositories.
            cache_dir: where downloads are kept.
            local_files_only: use what is cached, without network.
            force_download: download again.

        Raises:
            CheckpointError: nothing there, broken files, or an adapter of another model; what is missing, unexpected or
                of another shape is listed.
            UnsupportedError: what PEFT offers and this library does not, by its name.
            ValueError: the model has an adapter of this name, or its adapters are merged or disabled.
        """
        from easydel.infra import adapter_files

        adapter_files.load(
            self,
            adapter_name_or_path,
            adapter_name,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return self

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload model",
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: str | int = "5GB",
    ) -> str:
        """Save the model and upload it to the Hub in one commit, with a model card if the repository has none.

        Args:
            repo_id: `"user/name"`; created if it does not exist.
            commit_message: of the commit.
            private: whether a new repository is private.
            token: with write access.
            revision: branch to commit to.
            create_pr: open a pull request instead.
            max_shard_size: as in `save_pretrained`.

        Returns:
            The URL of the commit or pull request.

        Raises:
            CheckpointError: the Hub refused (wrong token, no such organisation) or cannot be reached.
        """
        from easydel.hub.card import model_card
        from easydel.hub.push import push_to_hub

        count = sum(v.get_value().size for v in named_variables(self, nnx.Param, by_layer=False).values())  # type: ignore[arg-type]
        card = model_card(
            repo_id,
            model_type=self.model_type,
            task=self.model_task,
            class_name=type(self).__name__,
            parameters=count,
            dtype=str(self.module_dtype),
        )
        return push_to_hub(
            lambda folder: self.save_pretrained(folder, max_shard_size=max_shard_size),
            repo_id,
            commit_message=commit_message,
            card=card,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

    def to_torch(self) -> dict[str, torch.Tensor]:
        """Return the weights as torch tensors, for `load_state_dict(..., strict=True)` of transformers' model.

        Raises:
            UnsupportedError: torch is not installed.
            ValueError: the model has adapters that are not folded into its weights.
        """
        from easydel.hub.torch import to_torch

        refuse_shapes(self, "to_torch")  # type: ignore[arg-type]
        refuse_unfolded(self, "to_torch")  # type: ignore[arg-type]
        return to_torch(self)  # type: ignore[arg-type]
