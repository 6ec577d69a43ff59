"""With bitsandbytes and accelerate installed: transformers opens our NF4 files, and we open those it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import easydel
from tests.quantization.tiny import IDS, LLAMA, logits

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    # What those packages themselves warn of when they are imported and run.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

ROUNDING = (
    1e-5  # of the largest logit: float32 products added up in another order, as for models of floats (tests/models)
)
SMALL = {name: value for name, value in LLAMA.items() if name != "max_position_embeddings"}
FAMILIES = {
    "Llama": SMALL,
    "Mistral": SMALL,
    "Qwen2": SMALL,  # with biases
    "Qwen3": SMALL,
    "Gemma2": SMALL | {"head_dim": 16},  # its head is tied
}


def build(family: str, folder: Path) -> Any:
    """Return our model with weights of its own, saved as floats, too."""
    config = getattr(easydel, f"{family}Config")(**FAMILIES[family], initializer_range=0.3)
    model = getattr(easydel, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    return model


def theirs(folder: Path, **options: Any) -> Any:
    """Load as a user of transformers would; without the kernel that rounds inputs to bfloat16 on some processors."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            assert hasattr(module, "support_avx512bf16_for_cpu")
            module.support_avx512bf16_for_cpu = False
    return model


def quantized_weights(model: Any) -> dict[str, np.ndarray]:
    """Return the floats that bitsandbytes makes of each quantized weight."""
    from bitsandbytes.functional import dequantize_4bit

    layers = {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    return {f"{n}.weight": dequantize_4bit(w, w.quant_state).float().numpy() for n, w in layers.items()}


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.array(IDS)).long()).logits.float().numpy()


def close(got: np.ndarray, wanted: np.ndarray, tolerance: float = ROUNDING) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(("family", "pattern"), [*((family, ".*") for family in FAMILIES), ("Llama", "mlp|layers/0")])
def test_transformers_opens_our_files(family: str, pattern: str, tmp_path: Path) -> None:
    model = build(family, tmp_path).quantize("nf4", quantization_pattern=pattern)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    hf = theirs(tmp_path)
    ours, weights = model.to_torch(), quantized_weights(hf)
    assert len(weights) == len(model.quantization_report.layers)
    for name, weight in weights.items():
        np.testing.assert_array_equal(ours[name].numpy(), weight, err_msg=name)
    close(their_logits(hf), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_we_open_what_transformers_quantized(family: str, double: bool, dtype: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    build(family, tmp_path / "floats")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    hf = theirs(tmp_path / "floats", quantization_config=settings, dtype=dtype)
    hf.save_pretrained(tmp_path / "codes")
    hf = theirs(tmp_path / "codes")
    model = getattr(easydel, f"{family}ForCausalLM").from_pretrained(tmp_path / "codes")
    ours, weights = model.to_torch(), quantized_weights(hf)
    assert len(weights) == len(model.quantization_report.layers) == 14
    for name, weight in weights.items():
        np.testing.assert_array_equal(ours[name].float().numpy(), weight, err_msg=name)
    # bfloat16 keeps 8 bits: sums are rounded in other places.
    close(logits(model).astype(np.float32), their_logits(hf), ROUNDING if dtype == "float32" else 0.03)


def test_codes_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    kernel = build("Llama", tmp_path).model.layers[0].mlp.up_proj.kernel.get_value()
    from easydel.quantization.formats import NF4

    weight = torch.from_numpy(np.ascontiguousarray(np.asarray(kernel).T))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    model = build("Llama", tmp_path).quantize("nf4")
    layer = model.model.layers[0].mlp.up_proj
    np.testing.assert_array_equal(state.code.numpy(), NF4)
    np.testing.assert_array_equal(layer.scales.get_value().reshape(-1), state.absmax.numpy())
    np.testing.assert_array_equal(layer.codes.get_value().reshape(-1, 1), codes.numpy())
