"""Low-rank adapters: layers that carry one, folding, several by name."""

from easydel.lora.adapters import adapted_layers, adapter_spec
from easydel.lora.choose import Planned, planned
from easydel.lora.combine import combined
from easydel.lora.config import LoraConfig
from easydel.lora.fold import FoldReport, fold_report
from easydel.lora.layer import AdapterSpec, LoraAdapter, LoraScale, is_adapted
from easydel.lora.named import (
    DEFAULT,
    Adapter,
    active_adapter,
    adapter_names,
    delete_adapter,
    disabled,
    get_adapter,
    put_adapter,
    set_adapter,
)
from easydel.lora.trees import learned_paths, lora_paths

__all__ = [
    "DEFAULT",
    "Adapter",
    "AdapterSpec",
    "FoldReport",
    "LoraAdapter",
    "LoraConfig",
    "LoraScale",
    "Planned",
    "active_adapter",
    "adapted_layers",
    "adapter_names",
    "adapter_spec",
    "combined",
    "delete_adapter",
    "disabled",
    "fold_report",
    "get_adapter",
    "is_adapted",
    "learned_paths",
    "lora_paths",
    "planned",
    "put_adapter",
    "set_adapter",
]
