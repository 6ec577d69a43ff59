"""What quantizing costs the embedded, trained model: perplexity of text it has not seen, and bytes of its layers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bars import Bar

RISES = {"8bit": 0.5, "a8bit": 0.5, "a8q": 1.0, "nf4": 4.0, "a4q": None}  # percent
SHARES = {"8bit": 0.29, "a8bit": None, "a8q": None, "nf4": 0.16, "a4q": None}  # of float32's bytes
WIDTH, HELD_OUT, CALIBRATION, BATCH = 256, 36, 2, 6


def measured(quick: bool = False) -> list[Bar]:
    """Quantize by each method and measure.

    Args:
        quick: on a sixth of the text: a check of the script.
    """
    windows = _windows()
    held_out, calibration = windows[: BATCH if quick else HELD_OUT], [windows[HELD_OUT:]]
    exact = perplexity(_load(), held_out)
    bars = [Bar("perplexity of the embedded model, float32", exact)]
    for method, allowed in RISES.items():
        model = _load().quantize(method, calibration=calibration if method == "a8bit" else None)
        rise = 100 * (perplexity(model, held_out) / exact - 1)
        bars.append(Bar(f"rise of perplexity, {method}", rise, most=allowed, unit=" %"))
        report = model.quantization_report
        memory, disk = (size / _float32_bytes(report) for size in (report.bytes_after, _bytes_on_disk(model)))
        bars.append(Bar(f"quantized layers in memory ÷ float32, {method}", memory, most=SHARES[method]))
        bars.append(Bar(f"quantized layers on disk ÷ float32, {method}", disk, most=SHARES[method]))
    cached = perplexity(_load(), held_out, cache="int8")
    return [*bars, Bar("rise of perplexity, keys and values as int8", 100 * (cached / exact - 1), unit=" %")]


def perplexity(model: Any, windows: np.ndarray, cache: str | None = None) -> float:
    """Return exp of the mean loss over `windows`, int32 `[n, width]`.

    Args:
        model: a causal language model.
        windows: of token ids.
        cache: `"int8"`: all but the first token attend through a cache of it.
    """
    import jax
    import jax.numpy as jnp

    forward = model.pure_transform_fn()

    @jax.jit
    def loss(params: Any, ids: Any, empty: Any) -> Any:
        if cache is None:
            logits = forward(params, {"input_ids": ids}).logits
        else:  # an empty cache would let its tokens attend to themselves as they are
            first = forward(params, {"input_ids": ids[:, :1], "cache": empty})
            rest = forward(params, {"input_ids": ids[:, 1:], "cache": first.cache})
            logits = jnp.concatenate([first.logits, rest.logits], axis=1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
        return -chosen.mean()

    parts = np.split(windows, len(windows) // BATCH)
    empty = None if cache is None else model.init_operations_cache(BATCH, windows.shape[1], dtype=cache)
    return float(np.exp(np.mean([loss(model.params, part, empty) for part in parts])))


def _load() -> Any:
    import jax.numpy as jnp

    from easydel import LlamaForCausalLM
    from easydel.assets import embedded_model_path

    return LlamaForCausalLM.from_pretrained(embedded_model_path(), dtype=jnp.float32)


def _windows() -> np.ndarray:
    from transformers import AutoTokenizer

    from easydel.assets import embedded_model_path, embedded_validation_path

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path(), model_max_length=10**6)
    ids = np.asarray(tokenizer(embedded_validation_path().read_text())["input_ids"], np.int32)
    count = HELD_OUT + CALIBRATION
    return ids[: count * WIDTH].reshape(count, WIDTH)


def _float32_bytes(report: Any) -> int:
    return sum(4 * int(np.prod(layer.shape)) for layer in report.layers)


def _bytes_on_disk(model: Any) -> int:
    """Return the bytes of the tensors that a checkpoint holds of the quantized layers."""
    from safetensors.numpy import load_file

    layers = {layer.path.replace("/", ".") for layer in model.quantization_report.layers}
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for file in Path(folder).glob("*.safetensors"):
            for name, array in load_file(file).items():
                if any(name.startswith(f"{layer}.") for layer in layers):
                    total += array.nbytes
    if not total:
        raise AssertionError(f"no tensor of the checkpoint belongs to {sorted(layers)[0]}")
    return total
