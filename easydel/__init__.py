"""easydel: the base module system for neural networks in JAX / Flax NNX.

Names are imported on first use: `import easydel` itself loads next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors
    from easydel.errors import CheckpointError as CheckpointError
    from easydel.errors import DistributedError as DistributedError
    from easydel.errors import EasyDeLError as EasyDeLError
    from easydel.errors import ShardingError as ShardingError
    from easydel.errors import TrainingError as TrainingError
    from easydel.errors import UnsupportedError as UnsupportedError
    from easydel.infra.auto import AutoEasyDeLConfig as AutoEasyDeLConfig
    from easydel.infra.auto import AutoEasyDeLModel as AutoEasyDeLModel
    from easydel.infra.auto import AutoEasyDeLModelForCausalLM as AutoEasyDeLModelForCausalLM
    from easydel.infra.auto import AutoEasyDeLModelForEmbedding as AutoEasyDeLModelForEmbedding
    from easydel.infra.auto import AutoEasyDeLModelForMaskedLM as AutoEasyDeLModelForMaskedLM
    from easydel.infra.auto import AutoEasyDeLModelForQuestionAnswering as AutoEasyDeLModelForQuestionAnswering
    from easydel.infra.auto import AutoEasyDeLModelForSeq2SeqLM as AutoEasyDeLModelForSeq2SeqLM
    from easydel.infra.auto import (
        AutoEasyDeLModelForSequenceClassification as AutoEasyDeLModelForSequenceClassification,
    )
    from easydel.infra.auto import AutoEasyDeLModelForTokenClassification as AutoEasyDeLModelForTokenClassification
    from easydel.infra.base_config import EasyDeLBaseConfig as EasyDeLBaseConfig
    from easydel.infra.base_module import EasyDeLBaseModule as EasyDeLBaseModule
    from easydel.infra.base_state import EasyDeLState as EasyDeLState
    from easydel.infra.compilation import CompilationCounter as CompilationCounter
    from easydel.infra.registry import TaskType as TaskType
    from easydel.infra.registry import register_config as register_config
    from easydel.infra.registry import register_module as register_module
    from easydel.lora import LoraConfig as LoraConfig
    from easydel.loss import LossConfig as LossConfig
    from easydel.planning import Plan as Plan
    from easydel.planning import Suggestion as Suggestion
    from easydel.planning import plan_training as plan_training
    from easydel.planning import suggest_mesh as suggest_mesh
    from easydel.training.arguments import TrainingArguments as TrainingArguments
    from easydel.training.data.config import DataConfig as DataConfig
    from easydel.training.elarge import eLargeModel as eLargeModel
    from easydel.training.trainer import Trainer as Trainer
    from easydel.verification import Verification as Verification
    from easydel.verification import verify as verify

_NAMES: dict[str, str] = {
    "AutoEasyDeLConfig": "easydel.infra.auto",
    "AutoEasyDeLModel": "easydel.infra.auto",
    "AutoEasyDeLModelForCausalLM": "easydel.infra.auto",
    "AutoEasyDeLModelForEmbedding": "easydel.infra.auto",
    "AutoEasyDeLModelForMaskedLM": "easydel.infra.auto",
    "AutoEasyDeLModelForQuestionAnswering": "easydel.infra.auto",
    "AutoEasyDeLModelForSeq2SeqLM": "easydel.infra.auto",
    "AutoEasyDeLModelForSequenceClassification": "easydel.infra.auto",
    "AutoEasyDeLModelForTokenClassification": "easydel.infra.auto",
    "CheckpointError": "easydel.errors",
    "CompilationCounter": "easydel.infra.compilation",
    "DataConfig": "easydel.training.data.config",
    "DistributedError": "easydel.errors",
    "EasyDeLBaseConfig": "easydel.infra.base_config",
    "EasyDeLBaseModule": "easydel.infra.base_module",
    "EasyDeLError": "easydel.errors",
    "EasyDeLState": "easydel.infra.base_state",
    "LoraConfig": "easydel.lora",
    "LossConfig": "easydel.loss",
    "Plan": "easydel.planning",
    "ShardingError": "easydel.errors",
    "Suggestion": "easydel.planning",
    "TaskType": "easydel.infra.registry",
    "Trainer": "easydel.training.trainer",
    "TrainingArguments": "easydel.training.arguments",
    "TrainingError": "easydel.errors",
    "UnsupportedError": "easydel.errors",
    "Verification": "easydel.verification",
    "eLargeModel": "easydel.training.elarge",
    "plan_training": "easydel.planning",
    "register_config": "easydel.infra.registry",
    "register_module": "easydel.infra.registry",
    "suggest_mesh": "easydel.planning",
    "verify": "easydel.verification",
}


def _all_names() -> dict[str, str]:
    from easydel.infra.registry import family_names

    return _NAMES | family_names()


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_all_names())
    if not name.startswith("_") and (module := _NAMES.get(name) or _all_names().get(name)):
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'easydel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_all_names(), *(name for name in globals() if name.startswith("__"))})
