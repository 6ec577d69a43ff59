"""Quantized models on disk: ours back bit by bit, NF4 as bitsandbytes has it, kernels quantized as they are read."""

from __future__ import annotations

import gc
import json

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec

from easydel import CheckpointError, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlamaModel, UnsupportedError
from easydel.quantization import apply
from easydel.sharding import create_mesh
from tests.quantization.tiny import CALIBRATION, IDS, POINTS, held, llama, logits, quantize, reference_nf4


def load(directory, **options) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, **options)


# The layout of bitsandbytes; our own with factors of inputs, and with codes packed in pairs.
KEPT, MORE = [("nf4", 64), ("a8bit", 64), ("a4q", 64)], [("8bit", 64), ("a8q", 64), ("nf4", 24)]


@pytest.mark.parametrize(("method", "size"), [*KEPT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_saved_and_reloaded_bit_by_bit(method, size, tmp_path):
    model = quantize(llama(num_hidden_layers=1), method, group_size=size)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = load(tmp_path)
    before, after = held(model), held(again)
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array, err_msg=path)
    np.testing.assert_array_equal(logits(again), logits(model))
    assert nnx.graphdef(again.model) == nnx.graphdef(model.model)  # so equal models share their compiled programs
    assert again.quantization_report.bytes_after == model.quantization_report.bytes_after
    on_disk = sum(
        array.nbytes
        for file in tmp_path.glob("*.safetensors")
        for name, array in safetensors.numpy.load_file(file).items()
        if "proj" in name or "lm_head" in name
    )
    small = 8 * 150 if method == "nf4" and size == 64 else 0  # bitsandbytes repeats code points and a few words
    assert on_disk <= model.quantization_report.bytes_after + small
    again.dequantize().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not load(tmp_path).is_quantized


def test_partly_quantized_stacked_sharded_and_without_head(tmp_path):
    model = llama().quantize("nf4", quantization_pattern="mlp|layers/0")
    model.save_pretrained(tmp_path)
    skipped = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head", *(f"model.layers.1.self_attn.{name}_proj" for name in "koqv")]
    exact = logits(model)
    np.testing.assert_array_equal(logits(load(tmp_path)), exact)
    with pytest.raises(UnsupportedError, match="load with scan_layers=False"):
        load(tmp_path, scan_layers=True)
    mesh = create_mesh((1, 2, 1, 2, 1), devices=jax.devices()[:4])
    sharded = load(tmp_path, mesh=mesh)
    assert sharded.model.layers[0].mlp.up_proj.codes.get_value().sharding.spec == PartitionSpec("tp", "fsdp")
    np.testing.assert_allclose(logits(sharded), exact, atol=1e-5)  # partial sums
    backbone = LlamaModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(
        held(backbone)["layers/0/mlp/up_proj/codes"], held(model)["model/layers/0/mlp/up_proj/codes"]
    )
    llama(scan_layers=True).quantize("nf4").save_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(load(tmp_path)), logits(llama().quantize("nf4")))
    assert load(tmp_path, scan_layers=True).is_quantized


@pytest.mark.parametrize(
    ("method", "pattern", "scan"),
    [
        ("nf4", "q_proj", False),
        ("8bit", "[kv]_proj|mlp", True),
        pytest.param("nf4", "q_proj", True, marks=pytest.mark.slow),
        pytest.param("8bit", "[kv]_proj|mlp", False, marks=pytest.mark.slow),
    ],
)
def test_a_part_of_a_fused_tensor_is_written_by_itself(method, pattern, scan, tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **dropped, bos_token_id=0, eos_token_id=0, scan_layers=scan)
    model = GPT2LMHeadModel(config, rngs=nnx.Rngs(0)).quantize(method, quantization_pattern=pattern)
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path, scan_layers=scan)
    for path, array in held(model).items():
        np.testing.assert_array_equal(held(again)[path], array, err_msg=path)
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert not [name for name in names if name.endswith("c_attn.weight")]
    assert len([name for name in names if name.endswith("c_attn.bias")]) == 2  # biases are fused as ever
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "easydel"
    model.dequantize().save_pretrained(tmp_path)
    assert "transformer.h.0.attn.c_attn.weight" in safetensors.numpy.load_file(tmp_path / "model.safetensors")


def test_nf4_is_written_as_bitsandbytes_has_it(tmp_path):
    model = llama()
    kernel = np.asarray(model.model.layers[0].mlp.down_proj.kernel.get_value())
    model.quantize("nf4", group_size=64).save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    codes, absmax = reference_nf4(kernel.T, 64)
    np.testing.assert_array_equal(tensors[name], codes.reshape(-1, 1))
    np.testing.assert_array_equal(tensors[f"{name}.absmax"], absmax.reshape(-1))
    np.testing.assert_array_equal(tensors[f"{name}.quant_map"], POINTS)
    state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    assert state == {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["load_in_4bit"] is True
    assert config["bnb_4bit_quant_type"] == "nf4"


def nested(absmax: np.ndarray, block: int) -> tuple[dict[str, np.ndarray], dict, np.ndarray]:
    """Quantize scales as double quantization does; return tensors, words and the scales they stand for."""
    offset = absmax.mean()
    points = np.sort(np.random.default_rng(0).uniform(-1, 1, 256)).astype(np.float32)
    groups = [absmax[start : start + block] - offset for start in range(0, len(absmax), block)]
    largest = np.float32([np.abs(group).max() for group in groups])
    codes = [np.abs(g[:, None] / m - points).argmin(axis=1) for g, m in zip(groups, largest, strict=True)]
    codes = np.concatenate(codes).astype(np.uint8)
    tensors = {"absmax": codes, "nested_absmax": largest, "nested_quant_map": points}
    words = {"nested_blocksize": block, "nested_offset": float(offset), "nested_dtype": "float32"}
    back = [points[c] * largest[n // block] + np.float32(offset) for n, c in enumerate(codes)]
    return tensors, words, np.float32(back)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A checkpoint as bitsandbytes would have made it with double quantization; and the floats it stands for."""
    folder = tmp_path_factory.mktemp("foreign")
    llama().save_pretrained(folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    floats = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors.pop(name)
        codes, absmax = reference_nf4(weight, 64)
        parts, words, scales = nested(absmax.reshape(-1), 16)
        tensors |= {f"{name}.{part}": array for part, array in parts.items()}
        tensors |= {name: codes.reshape(-1, 1), f"{name}.quant_map": POINTS}
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)} | words
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        nibbles = np.stack([codes >> 4, codes & 15], axis=-1).reshape(weight.shape)
        floats[name] = POINTS[nibbles] * np.repeat(scales.reshape(len(weight), -1), 64, axis=1)
    write(folder, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    return folder, tensors, floats


def write(folder, tensors, settings):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_checkpoints_of_bitsandbytes_with_nested_scales(foreign):
    folder, _, floats = foreign
    model = load(folder)
    assert model.is_quantized
    assert not any("lm_head" in layer.path for layer in model.quantization_report.layers)
    for name, wanted in model.to_torch().items():
        np.testing.assert_allclose(wanted.numpy(), floats[name], rtol=1e-6, err_msg=name)  # float32 products


NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
NF4_SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def state_with(tensors, **changes):
    state = json.loads(tensors[STATE].tobytes()) | changes
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


@pytest.mark.parametrize(
    ("settings", "change", "error", "message"),
    [
        ({"quant_method": "gptq"}, lambda t: {}, UnsupportedError, "'gptq' are not supported"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda t: {}, UnsupportedError, "8-bit and FP4"),
        (NF4_SETTINGS | {"bnb_4bit_quant_type": "fp4"}, lambda t: {}, UnsupportedError, "8-bit and FP4"),
        ({"quant_method": "easydel", "method": "x"}, lambda t: {}, CheckpointError, "method 'x'"),
        ("nf4", lambda t: {}, CheckpointError, "does not accept it"),
        (NF4_SETTINGS, lambda t: {STATE: t[STATE][:9]}, CheckpointError, "not valid JSON"),
        (NF4_SETTINGS, lambda t: {STATE: state_with(t, shape=[64])}, CheckpointError, "expected|should say"),
        (NF4_SETTINGS, lambda t: {STATE: state_with(t, blocksize=48)}, UnsupportedError, "end of a row"),
        (
            NF4_SETTINGS,
            lambda t: {f"{NAME}.absmax": t[f"{NAME}.absmax"][:3]},
            CheckpointError,
            r"uint8 \(128,",
        ),
        (NF4_SETTINGS, lambda t: {f"{NAME}.quant_map": POINTS[::-1].copy()}, UnsupportedError, "published map"),
    ],
)
def test_unsound_checkpoints_are_refused(settings, change, error, message, foreign, tmp_path):
    folder, tensors, _ = foreign
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    write(tmp_path, tensors | change(tensors), settings)
    with pytest.raises(error, match=message):
        load(tmp_path)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    llama().save_pretrained(folder)
    return folder


LOADED = [("nf4", True), ("a8q", False), ("a4q", False)]
LOADED_TOO = [("nf4", False), ("8bit", False), ("8bit", True), ("a8q", True), ("a4q", True)]


@pytest.mark.parametrize(
    ("method", "scan"), [*LOADED, *(pytest.param(*case, marks=pytest.mark.slow) for case in LOADED_TOO)]
)
def test_quantized_while_loading(method, scan, floats):
    model = load(floats, quantization_method=method, quantization_group_size=32, scan_layers=scan)
    wanted = llama(scan_layers=scan).quantize(method, group_size=32)
    for path, array in held(wanted).items():
        np.testing.assert_array_equal(held(model)[path], array, err_msg=path)
    one, two = model.quantization_report, wanted.quantization_report
    assert one.bytes_after == two.bytes_after
    # Norms are summed in another order
    assert [x.relative_error for x in one.layers] == pytest.approx([x.relative_error for x in two.layers], rel=1e-4)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_calibrated_when_loaded(scan, floats):
    options = {"quantization_method": "a8bit", "quantization_group_size": 32, "quantization_pattern": "mlp"}
    model = load(floats, quantization_calibration=CALIBRATION, scan_layers=scan, **options)
    wanted = llama(scan_layers=scan).quantize("a8bit", 32, "mlp", calibration=CALIBRATION)
    for path, array in held(wanted).items():
        np.testing.assert_array_equal(held(model)[path], array, err_msg=path)


def test_calibrated_kernels_are_freed_one_by_one(floats, monkeypatch):
    fill, alive = apply.fill_layer, []

    def watched(*args):
        alive.append(sum(a.size == 128 * 64 and a.dtype == np.float32 for a in jax.live_arrays()))
        fill(*args)

    monkeypatch.setattr(apply, "fill_layer", watched)
    gc.collect()
    options = {"quantization_method": "a8bit", "quantization_pattern": "mlp"}
    load(floats, quantization_calibration=CALIBRATION, **options)
    assert len(alive) == 6
    assert [alive[0] - count for count in alive] == [*range(6)]


def test_the_float_model_never_exists_whole(floats, monkeypatch):
    """At most one float kernel is alive while the next tensor is read."""
    from easydel.hub import load as loading

    place, alive = loading.place_link, []

    def watched(link, *args):
        sizes = [array.size for array in jax.live_arrays() if array.ndim == 2 and array.dtype == np.float32]
        alive.append(sizes.count(128 * 64))
        return place(link, *args)

    gc.collect()
    start = [a.size for a in jax.live_arrays() if a.ndim == 2 and a.dtype == np.float32].count(128 * 64)
    monkeypatch.setattr(loading, "place_link", watched)
    model = load(floats, quantization_method="8bit")
    assert len(alive) > 15
    assert max(alive) - start <= 1
    assert model.is_quantized


def test_loading_options_are_checked(floats, tmp_path):
    with pytest.raises(ValueError, match="'a8bit' only, not by 'nf4'"):
        load(floats, quantization_method="nf4", quantization_calibration=CALIBRATION)
    with pytest.raises(ValueError, match="group_size=0"):
        load(floats, quantization_method="a8bit", quantization_group_size=0)
    with pytest.raises(ValueError, match="need a quantization_method"):
        load(floats, quantization_calibration=CALIBRATION)
    with pytest.raises(ValueError, match="unknown quantization method"):
        load(floats, quantization_method="int8")
    with pytest.raises(ValueError, match="need a quantization_method"):
        load(floats, quantization_group_size=32)
    with pytest.raises(ValueError, match="matches no linear layer"):
        load(floats, quantization_method="nf4", quantization_pattern="norm")
    llama().quantize("8bit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already"):
        load(tmp_path, quantization_method="nf4")
    sharded = load(floats, quantization_method="nf4", mesh=create_mesh((1, 2, 1, 2, 1), devices=jax.devices()[:4]))
    np.testing.assert_allclose(logits(sharded, IDS), logits(llama().quantize("nf4")), atol=1e-5)  # partial sums
    state = llama().quantize("8bit").to_state(optax.sgd(0.1))
    with pytest.raises(UnsupportedError, match="save_state is not supported for a quantized model"):
        state.save_state(tmp_path / "state")
