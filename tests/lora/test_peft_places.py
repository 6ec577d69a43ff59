"""Where adapters in PEFT's files come from and go to: runs, the Hub, quantized bases, classes of a user's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError

from easydel import EasyDeLBaseModule
from easydel.errors import CheckpointError
from tests.lora.peft_models import FORWARD, loaded, our_logits, same_files
from tests.lora.tiny import arrays_of, assert_unharmed, randomise
from tests.models.pairs import close
from tests.training.runs import tiny_llama, trainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_a_run_of_adapters_leaves_them_in_peft_s_files(tmp_path: Path) -> None:
    """Of a base that was loaded; one that was made for the run would be lost, so it is written whole."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base").apply_lora_to_layers(4, 8, "(q|v)_proj")
    settings = {"schedule": "constant", "warmup_steps": 0, "max_steps": 2, "save_model": True}
    result = trainer(tmp_path / "run", model, **settings).train()
    left = tmp_path / "run" / "model"
    assert {path.name for path in left.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    ids = np.arange(12)[None] % 32
    want = np.asarray(result.model(jnp.asarray(ids)).logits)
    again = type(model).from_pretrained(tmp_path / "base").load_adapter(left)
    close(again(jnp.asarray(ids)).logits, want, FORWARD)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(left)
    import torch

    with torch.no_grad():
        close(theirs(input_ids=torch.from_numpy(ids).long()).logits, want, FORWARD)
    assert isinstance(theirs.base_model.model, transformers.LlamaForCausalLM)


def test_the_hub_is_asked_for_an_adapter_s_files_only(
    case: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], Any]] = []
    snapshot = tmp_path / "models--org--adapter" / "snapshots" / ("0" * 40)

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((allow_patterns, options["revision"]))
        if name != "org/adapter":
            raise LocalEntryNotFoundError("offline")
        for file in allow_patterns:
            if (saved / file).is_file():
                (snapshot).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(saved / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = nnx.clone(case.ours).load_adapter("org/adapter", revision="v2")
    assert asked == [(["adapter_config.json", "adapter_model.safetensors"], "v2")]
    assert_unharmed(model, arrays_of(loaded(case, saved)))
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        nnx.clone(case.ours).load_adapter("org/other")


@pytest.mark.parametrize("method", ["nf4", "8bit"])
def test_a_quantized_base_takes_and_gives_them(method: str, case: Any, saved: Path, tmp_path: Path) -> None:
    model = nnx.clone(case.ours).quantize(method, 16).load_adapter(saved)
    by_hand = nnx.clone(case.ours).quantize(method, 16).apply_lora_to_layers(4, 6, "(q|v)_proj")
    by_hand.merge_lora_params(loaded(case, saved).split_lora_params()[1])
    inputs = case.inputs(case.ids(2, 9))
    np.testing.assert_array_equal(our_logits(model, inputs), our_logits(by_hand, inputs))
    model.save_adapter(tmp_path / "quantized")
    loaded(case, saved).save_adapter(tmp_path / "floats")
    same_files(tmp_path / "quantized", tmp_path / "floats")


class Small(EasyDeLBaseModule):
    """A class that no registry knows, of plain layers."""

    def __init__(self, config: Any, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(config, rngs=rngs, **options)
        self.table = nnx.Embed(8, 6, rngs=rngs)
        self.hidden = nnx.Linear(6, 5, rngs=rngs)
        self.spread = nnx.LinearGeneral((5,), (2, 3), rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        return self.spread(self.hidden(self.table(ids)))


def test_a_class_of_a_user_s_own_has_its_own_names(tmp_path: Path) -> None:
    def small() -> Small:
        return Small(transformers.PretrainedConfig(), nnx.Rngs(0))

    model = randomise(small().apply_lora_to_layers(2, 4, "table|hidden", embeddings=True))
    model.save_adapter(tmp_path / "adapter")
    ids = jnp.arange(8)
    np.testing.assert_array_equal(small().load_adapter(tmp_path / "adapter")(ids), model(ids))
    spread = small().apply_lora_to_layers(2, 4, "spread")
    with pytest.raises(ValueError, match="PEFT has no layer for spread"):
        spread.save_adapter(tmp_path / "none")


def test_a_full_disk_leaves_the_old_adapter(case: Any, saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "adapter"
    loaded(case, saved).save_adapter(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = randomise(loaded(case, saved))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("easydel.hub.files.shutil.disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="nothing was changed"):
        model.save_adapter(folder)
    with pytest.raises(CheckpointError, match="nothing was changed"):
        model.save_adapter(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    model.save_adapter(folder)
    assert {path.name for path in folder.iterdir()} == before.keys()
    assert (folder / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
