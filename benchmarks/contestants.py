"""The three that are compared, behind the same few verbs."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-4


class Contestant(Protocol):
    """What each of them can do. Every verb returns only when the work is done."""

    name: str

    def load(self, path: Path) -> None:
        """Load the checkpoint; all weights are in memory on return."""

    def unload(self) -> None:
        """Forget the model and the training state."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return all logits `[batch, seq, vocab]`."""

    def generate(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Continue prompts greedily through a cache; return the new tokens `[batch, count]`."""

    def start_training(self) -> None:
        """Make the optimizer's state; the loaded model is used up."""

    def train_step(self, ids: np.ndarray) -> float:
        """Update once on a batch `[batch, seq]`; return the loss before the update."""


class Transformers:
    """transformers with PyTorch: inference mode, its dynamic cache, its default attention (SDPA)."""

    name = "transformers"

    def __init__(self, dtype: str = "float32", device: str = "cpu") -> None:
        import torch

        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)
        if device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model: Any = None

    def load(self, path: Path) -> None:
        """See `Contestant.load`."""
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).to(self.device)
        with self.torch.inference_mode():
            for weight in self.model.parameters():  # one element of each page: mapped weights must be there, too
                weight.view(-1)[::1024].sum()
        self.wait()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            self.torch.cuda.synchronize()

    def unload(self) -> None:
        """See `Contestant.unload`."""
        self.model = self.optimizer = None
        gc.collect()

    def _tensor(self, ids: np.ndarray) -> Any:
        return self.torch.from_numpy(ids).long().to(self.device)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Contestant.logits`."""
        with self.torch.inference_mode():
            return self.model(self._tensor(ids)).logits.float().cpu().numpy()

    def forward(self, ids: np.ndarray) -> None:
        """Run a bare forward pass with a cache and the last position's logits."""
        with self.torch.inference_mode():
            self.model(self._tensor(ids), use_cache=True, logits_to_keep=1).logits[0, -1, 0].item()

    def generate(self, ids: np.ndarray, count: int) -> np.ndarray:
        """See `Contestant.generate`."""
        tensor = self._tensor(ids)
        with self.torch.inference_mode():
            out = self.model.generate(
                tensor, attention_mask=self.torch.ones_like(tensor), max_new_tokens=count, do_sample=False
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    def start_training(self) -> None:
        """See `Contestant.start_training`."""
        self.model.train()
        weights = self.model.parameters()
        self.optimizer = self.torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def train_step(self, ids: np.ndarray) -> float:
        """See `Contestant.train_step`."""
        tensor = self._tensor(ids)
        loss = self.model(input_ids=tensor, labels=tensor, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Handwritten:
    """The functional Llama of `handwritten.py`."""

    name = "hand-written JAX"

    def __init__(self) -> None:
        from benchmarks import handwritten

        self.code = handwritten
        self.params: Any = None

    def load(self, path: Path) -> None:
        """See `Contestant.load`."""
        self.params, self.config = self.code.load(path)

    def unload(self) -> None:
        """See `Contestant.unload`."""
        self.params = self.state = None
        gc.collect()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Contestant.logits`."""
        return np.asarray(self.code.all_logits(self.params, ids, self.config), np.float32)

    def generate(self, ids: np.ndarray, count: int) -> np.ndarray:
        """See `Contestant.generate`."""
        return np.asarray(self.code.generate(self.params, self.config, ids, count))

    def start_training(self) -> None:
        """See `Contestant.start_training`."""
        self.state = self.code.OPTIMIZER.init(self.params)

    def train_step(self, ids: np.ndarray) -> float:
        """See `Contestant.train_step`."""
        self.params, self.state, loss = self.code.train_step(self.params, self.state, ids, self.config)
        return float(loss)


class EasyDeL:
    """This library, by its public names only."""

    name = "easydel"

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype
        self.model: Any = None

    def load(self, path: Path) -> None:
        """See `Contestant.load`."""
        import jax

        from easydel import AutoEasyDeLModelForCausalLM

        self.model = AutoEasyDeLModelForCausalLM.from_pretrained(path, dtype=jax.numpy.dtype(self.dtype))
        jax.block_until_ready(self.model.params)

    def unload(self) -> None:
        """See `Contestant.unload`."""
        self.model = self.step = None
        gc.collect()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """See `Contestant.logits`."""
        return np.asarray(self.model(input_ids=ids).logits, np.float32)

    def generate(self, ids: np.ndarray, count: int) -> np.ndarray:
        """See `Contestant.generate`."""
        out = self.model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
        return np.asarray(out.sequences)[:, ids.shape[1] :]

    def start_training(self) -> None:
        """See `Contestant.start_training`."""
        import optax

        from easydel.training import TrainStep

        state = self.model.to_state(optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
        self.model = None  # its arrays are the state's, and are given away with it
        self.step = TrainStep(state, keep=False)

    def train_step(self, ids: np.ndarray) -> float:
        """See `Contestant.train_step`."""
        return float(self.step({"input_ids": ids, "labels": ids})["loss"])


def contestants() -> list[Any]:
    """Return all three, ours last."""
    return [Transformers(), Handwritten(), EasyDeL()]
