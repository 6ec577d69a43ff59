"""Whether arguments, data and mesh of a run fit each other; asked before anything is compiled or written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from easydel.errors import ShardingError
from easydel.training.arguments import TrainingArguments, defaults
from easydel.training.data import Batch, DataConfig
from easydel.training.rows import check_rows

_OF_EVALUATION = (
    "eval_steps", "eval_batch_size", "best_metric", "lowest_is_best", "early_stopping_patience",
    "early_stopping_threshold", "load_best_model_at_end",
)  # fmt: skip


def check_run(arguments: TrainingArguments, train_data: Any, eval_data: Any, mesh: Mesh | None) -> None:
    """Refuse arguments that would have no effect, and batches that do not fit the mesh.

    Raises:
        ValueError: evaluation is asked for without data, or two places say how often the data are gone through.
        ShardingError: the devices do not divide a batch, or several processes would each train a model of their own.
    """
    if mesh is None and jax.process_count() > 1:
        raise ShardingError(
            f"{jax.process_count()} processes train one model together, but this one lies on this process's device "
            "alone: put it on a mesh of all devices (shard_model(), sharded_init(), auto_shard_model=True)"
        )
    usual = defaults(TrainingArguments)
    asked = [name for name in _OF_EVALUATION if getattr(arguments, name) != usual[name]]
    if eval_data is None and asked:
        raise ValueError(f"{', '.join(asked)}: there are no evaluation data; give some (eval_data, data.eval)")
    if arguments.num_train_epochs != 1 and not isinstance(train_data, DataConfig):
        raise ValueError(
            f"num_train_epochs={arguments.num_train_epochs} goes with a DataConfig; other data are gone through once"
        )
    if isinstance(train_data, DataConfig):
        if train_data.epochs is not None and arguments.num_train_epochs != 1:
            raise ValueError(
                f"the data's epochs={train_data.epochs} and num_train_epochs={arguments.num_train_epochs} say the same "
                "thing; leave one out"
            )
        check_rows(arguments.batch_size, mesh)
    if isinstance(eval_data, DataConfig):
        check_rows(arguments.eval_batch_size or arguments.batch_size, mesh)


def check_batch(batch: Any) -> Batch:
    """Return a batch that is one.

    Raises:
        TypeError: it is no mapping.
        ValueError: it has no labels.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a mapping of arrays by name, got {type(batch).__name__}")
    if "labels" not in batch:
        raise ValueError(f"a batch needs 'labels' to learn from, got {', '.join(batch) or 'nothing'}")
    return dict(batch)
