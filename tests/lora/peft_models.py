"""PEFT's models with adapters that matter, their files, and what both libraries make of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from flax import nnx

from easydel.paths import flatten
from tests.models.inputs import as_torch
from tests.models.pairs import Jitted, Pair

FORWARD = 1e-5  # float32 in two libraries; the bar of adapters in both


def peft_of(case: Pair, **options: Any) -> Any:
    """Return PEFT's model of a pair, its adapters (and modules trained whole) with random numbers."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | options))
    model = peft.get_peft_model(copy.deepcopy(case.hf), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + noise)
            elif "lora_" in name or "modules_to_save" in name:
                parameter.add_(noise)
    return model


def reloaded(case: Pair, folder: Path) -> Any:
    """Return PEFT's model with the adapter of a folder."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(case.hf), folder).eval()


def loaded(case: Pair, folder: Path) -> Any:
    """Return ours with the adapter of a folder."""
    return nnx.clone(case.ours).load_adapter(folder)


def their_logits(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return model(**as_torch(inputs)).logits.numpy()


def our_logits(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    return np.asarray(Jitted(model)(**inputs).logits)


def tree_of(model: Any) -> dict[str, Any]:
    """Return path → array of what is trained with adapters."""
    return flatten(model.split_lora_params()[1])


def same_files(one: Path, other: Path) -> None:
    """Assert that two folders hold the same files, byte by byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
