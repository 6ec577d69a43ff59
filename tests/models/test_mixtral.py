"""What the table does not ask of a mixture of experts: its balancing loss, forms of checkpoint, meshes, FLOPs."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

import easydel
from easydel.infra import LossConfig
from easydel.paths import flatten
from tests.models.inputs import as_torch, int32, pad
from tests.models.pairs import Jitted, Pair, array, close, load_ours, pair

COEFFICIENT = 0.5  # large enough to matter


def padded(case: Pair) -> dict[str, np.ndarray]:
    ids, mask = pad(case.rows((12, 7)), 12, left=False)
    return case.labelled(ids, mask)


@pytest.mark.parametrize(("variant", "masked"), [("router_logits", True), ("many_experts", False)])
def test_balancing_loss(variant: str, masked: bool) -> None:
    case = pair("mixtral", variant, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    inputs = padded(case) if masked else case.labelled(case.ids(2, 9))
    case.hf.zero_grad()
    want = case.hf(**as_torch(inputs))
    want.loss.backward()
    close(case.run(**inputs).auxiliary_loss, want.aux_loss, 1e-5)
    loss, gradients = case.run.gradient(**inputs)
    close(loss, want.loss, 1e-5)
    plain = float(case.run(**inputs, output_router_logits=False).loss)
    assert abs(float(loss) - plain) > 0.1, "the balancing loss has no effect"
    named = nnx.clone(case.ours).merge_params_dict(gradients).to_torch()
    largest = max(float(p.grad.abs().max()) for p in case.hf.parameters())
    for name, parameter in case.hf.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-3 * largest)
        assert float((named[name] - parameter.grad).abs().max()) <= 1e-4 * scale, name


def test_a_loss_config_asks_for_the_balancing_loss_and_its_coefficient_wins() -> None:
    plain = pair("mixtral", "gqa")
    inputs = padded(plain)
    with torch.no_grad():
        want = plain.hf(**as_torch(inputs), output_router_logits=True)
    base, asked = plain.run(**inputs), plain.run(**inputs, loss_config=LossConfig(auxiliary_loss_coefficient=0.25))
    assert base.auxiliary_loss is None
    assert base.router_logits is None
    assert asked.router_logits is None, "only the loss was asked for"
    close(asked.auxiliary_loss, want.aux_loss, 1e-5)
    close(asked.loss, base.loss + 0.25 * want.aux_loss.item(), 1e-5)

    case = pair("mixtral", "router_logits")
    off = case.run(**inputs, loss_config=LossConfig(auxiliary_loss_coefficient=0.0))
    close(off.loss, base.loss, 1e-6)
    labels = inputs.pop("labels")
    loss, metrics = case.ours.compute_loss(labels=labels, config=LossConfig(auxiliary_loss_coefficient=2.0), **inputs)
    close(metrics["auxiliary_loss"], want.aux_loss, 1e-5)
    close(loss, base.loss + 2 * want.aux_loss.item(), 1e-5)
    assert "auxiliary_loss" not in plain.ours.compute_loss(labels=labels, **inputs)[1]


def test_router_logits_are_given_if_asked_for() -> None:
    case = pair("mixtral", "gqa")
    ids = case.ids(2, 5)
    assert [r.shape for r in case.run(input_ids=ids, output_router_logits=True).router_logits] == [(2, 5, 4)] * 2
    with pytest.raises(TypeError, match="output_router_logits"):
        pair("llama", "gqa").ours.prepare_inputs_for_call(input_ids=ids, output_router_logits=True)


def test_jitter_is_for_training() -> None:
    case = pair("mixtral", "gqa", router_jitter_noise=0.3)
    inputs = case.inputs(case.ids(2, 9))
    close(case.run(**inputs).logits, case.theirs(**inputs).logits, 1e-4)
    pure, params = case.ours.pure_transform_fn(), case.ours.params
    draw = jax.jit(lambda key: pure(params, inputs, rngs=key).logits)
    one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.asarray(one - other)).max() > 1e-2


def stacked(case: Pair, folder: Path, layers: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Write the checkpoint with some layers in the form of transformers' model in memory."""
    shutil.copytree(case.folder, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    memory = {name: tensor.numpy() for name, tensor in case.hf.state_dict().items()}
    for layer in layers:
        prefix = f"model.layers.{layer}."
        tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{prefix}block_sparse_moe.")}
        tensors |= {name: t for name, t in memory.items() if name.startswith(f"{prefix}mlp.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_both_forms_of_checkpoint_load(layers: tuple[int, ...], tmp_path: Path) -> None:
    case = pair("mixtral", "gqa")
    stacked(case, tmp_path, layers)
    again = load_ours(case.family, case.task, tmp_path)
    for path, want in flatten(case.ours.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], want, err_msg=path)


def test_saved_files_have_the_names_transformers_saves(tmp_path: Path) -> None:
    case = pair("mixtral", "gqa")
    case.ours.save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, case.folder))
    assert ours.keys() == theirs.keys()
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 4
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("layers", "gone", "others"),
    [
        ((), "model.layers.0.block_sparse_moe.experts.2.w3.weight", ("experts.1.w3", "mlp.experts")),
        ((0, 1), "model.layers.1.mlp.experts.down_proj", ("block_sparse_moe",)),
        ((0, 1), "model.layers.0.mlp.experts.gate_up_proj", ("block_sparse_moe",)),
    ],
)
def test_missing_experts_are_named_in_the_form_the_file_has(
    layers: tuple[int, ...], gone: str, others: tuple[str, ...], tmp_path: Path
) -> None:
    case = pair("mixtral", "gqa")
    tensors = stacked(case, tmp_path, layers)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(easydel.CheckpointError, match=gone) as caught:
        load_ours(case.family, case.task, tmp_path)
    missing = [line for line in str(caught.value).splitlines() if "missing" in line]
    assert not any(other in line.partition("nearest")[0] for line in missing for other in others), missing


@pytest.mark.parametrize("mechanism", ["blocks", "ragged"])
@pytest.mark.parametrize("dims", [(1, 1, 4, 2, 1), (2, 1, 4, 1, 1), (1, 2, 2, 1, 2)])
def test_expert_parallel_equals_one_device(dims: tuple[int, ...], mechanism: str) -> None:
    check_expert_parallel(pair("mixtral", "router_logits", router_aux_loss_coef=COEFFICIENT), dims, mechanism)


def test_biases_of_experts_on_many_devices_count_once() -> None:
    check_expert_parallel(pair("gpt_oss", "gqa"), (1, 1, 4, 2, 1), "blocks")


def check_expert_parallel(case: Pair, dims: tuple[int, ...], mechanism: str) -> None:
    inputs = case.labelled(case.ids(8, 16))
    want, want_gradients = case.run.step(**inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(axis|axes).*")  # sizes of a tiny model need not divide
        sharded = load_ours(
            case.family,
            case.task,
            case.folder,
            sharding_axis_dims=dims,
            moe_mechanism=mechanism,
            auto_shard_model=True,
        )
    kernel = sharded.model.layers[0].mlp.experts.gate_proj.kernel.get_value()
    assert kernel.addressable_shards[0].data.shape[0] == 4 // dims[2]
    out, gradients = Jitted(sharded).step(**inputs)
    close(out.logits, want.logits, 1e-5, "logits")
    close(out.loss, want.loss, 1e-5, "loss")
    wanted = flatten(want_gradients)
    largest = max(np.abs(array(g)).max() for g in wanted.values())
    for path, gradient in flatten(gradients).items():
        reference = array(wanted[path])
        scale = max(np.abs(reference).max(), 1e-3 * largest)
        assert np.abs(array(gradient) - reference).max() <= 1e-4 * scale, path


def test_flops_count_the_chosen_experts_only() -> None:
    config = easydel.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
    )
    length = 16
    attention = 2 * 32 * (32 + 16 + 16 + 32) + 2 * 2 * length * 32
    experts = 2 * 32 * 6 + 2 * (3 * 2 * 32 * 40)
    model = easydel.MixtralForCausalLM(config)
    assert model.flops_per_token(2, length) == 3 * (attention + experts) + 2 * 32 * 96


def test_cached_run_takes_the_mask_of_its_own_tokens() -> None:
    case = pair("mixtral", "router_logits")
    ids, mask = pad(case.rows((9, 5)), 9, left=True)
    first = case.run(input_ids=ids[:, :6], attention_mask=mask[:, :6], cache=case.ours.init_operations_cache(2, 9))
    second = case.run(input_ids=ids[:, 6:], attention_mask=mask, cache=first.cache)
    whole = case.run(input_ids=ids, attention_mask=mask)
    for layer, logits in enumerate(whole.router_logits):
        close(second.router_logits[layer], logits[:, 6:], 1e-5)
    assert np.isfinite(second.auxiliary_loss)
    assert int32(second.cache.index) == 9
