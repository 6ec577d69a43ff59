"""Training with adapters from PEFT's files: gradients, steps, states, several of them, and modules trained whole."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from easydel import EasyDeLState, LoraConfig
from easydel.paths import flatten, nest
from tests.lora.peft_models import FORWARD, loaded, our_logits, peft_of, their_logits, tree_of
from tests.lora.tiny import TARGETS, arrays_of, assert_unharmed, from_peft
from tests.models.pairs import close, pair
from tests.models.table import FAMILIES

GRADIENTS, WEIGHTS = 1e-4, 1e-6
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:embedding and head are untied"),
]
WHOLE = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


@functools.cache
def trained(family: str, **options: Any) -> tuple[Any, Any, Path]:
    """Return a pair, PEFT's model of it, and the folder of its adapter."""
    case = pair(family, FAMILIES[family].main.name)
    theirs = peft_of(case, target_modules=TARGETS[family][0], fan_in_fan_out=family == "gpt2", **options)
    folder = Path(tempfile.mkdtemp(prefix="adapter-"))
    theirs.save_pretrained(folder)
    return case, theirs, folder


@functools.cache
def whole_head() -> tuple[Any, Any, Path]:
    case = pair("llama", FAMILIES["llama"].main.name)
    theirs = peft_of(case, **WHOLE)
    folder = Path(tempfile.mkdtemp(prefix="adapter-"))
    theirs.save_pretrained(folder)
    return case, theirs, folder


def gradients(model: Any, ids: np.ndarray) -> dict[str, Any]:
    """Return path → gradient of what is trained with adapters."""
    base, lora = model.split_lora_params()
    pure, tokens = model.pure_transform_fn(), jnp.asarray(ids)

    @jax.jit
    def run(lora: Any) -> Any:
        def loss(lora: Any) -> Any:
            return pure(nest(flatten(base) | flatten(lora)), {"input_ids": tokens, "labels": tokens}).loss

        return jax.grad(loss)(lora)

    return flatten(run(lora))


def their_gradients(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    model.zero_grad()
    tokens = torch.from_numpy(ids).long()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


def but(*slow: str) -> list[Any]:
    return [pytest.param(family, marks=pytest.mark.slow if family in slow else ()) for family in TARGETS]


@pytest.mark.parametrize("family", but("llama", "qwen3"))
def test_gradients_are_peft_s(family: str) -> None:
    """Of a fused layer there is one A, and its gradient is that of PEFT's."""
    case, theirs, folder = trained(family)
    ids = case.ids(2, 9)
    got = gradients(loaded(case, folder), ids)
    want = from_peft(family, their_gradients(theirs, ids))
    if family == "gpt2":  # of the three that stand for PEFT's A, the first by name is the one variable
        want = {path: value for path, value in want.items() if not path.endswith(("q_proj/lora/a", "v_proj/lora/a"))}
    assert got.keys() == want.keys()
    for path, gradient in want.items():
        close(got[path], gradient, GRADIENTS, path)


@pytest.mark.parametrize("family", but("qwen3"))
def test_merged_weights_are_peft_s(family: str) -> None:
    case, theirs, folder = trained(family)
    mine = loaded(case, folder).merge_and_unload().to_torch()
    for name, tensor in copy.deepcopy(theirs).merge_and_unload().state_dict().items():
        close(mine[name], tensor, WEIGHTS, name)


def test_a_module_trained_whole_has_peft_s_gradient() -> None:
    case, theirs, folder = whole_head()
    ids = case.ids(2, 9)
    got, want = gradients(loaded(case, folder), ids), their_gradients(theirs, ids)
    head = next(gradient for name, gradient in want.items() if "modules_to_save" in name)
    close(got["lm_head/kernel"], head.T, GRADIENTS)
    assert len(got) == len(want)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_state_trains_shared_factors_and_whole_modules_and_keeps_them(scan: bool, tmp_path: Any) -> None:
    case = pair("gpt2", FAMILIES["gpt2"].main.name)
    config = LoraConfig(rank=2, alpha=4, pattern="(q|k|v)_proj", fused=True, modules_to_save=("^transformer/norm$",))
    base = type(case.ours).from_pretrained(case.folder, scan_layers=scan)
    model = nnx.clone(base).add_adapter("default", config)
    state = model.to_state(optax.adam(1e-2))
    trained_paths = set(flatten(state.trainable_params))
    assert {path.rpartition("/")[2] for path in trained_paths} == {"a", "b", "scale", "bias"}
    assert len([path for path in trained_paths if path.endswith("/a")]) == len(
        [path for path in trained_paths if path.endswith("k_proj/lora/b")]
    )
    pure, ids = model.pure_transform_fn(), jnp.asarray(case.ids(2, 9))

    @jax.jit
    def step(state: EasyDeLState) -> Any:
        def loss(params: Any) -> Any:
            return pure(state.with_params(params).params, {"input_ids": ids, "labels": ids}).loss

        value, grads = jax.value_and_grad(loss)(state.trainable_params)
        return state.apply_gradients(grads), value

    losses = []
    for _ in range(4):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    state.save_state(tmp_path / "state")
    again = EasyDeLState.load_state(tmp_path / "state", optax.adam(1e-2), model=base)
    for path, array in flatten(state.trainable_params).items():
        np.testing.assert_array_equal(flatten(again.trainable_params)[path], array, err_msg=path)
    again.model.save_adapter(tmp_path / "adapter")
    inputs = case.inputs(case.ids(2, 9))
    close(our_logits(loaded(case, tmp_path / "adapter"), inputs), our_logits(state.model, inputs), FORWARD)
    again.model.lora_is_enabled  # noqa: B018 - a copy of the model has no base to go back to
    with pytest.raises(ValueError, match="norm/bias is without the adapter is not known here"):
        again.model.delete_adapter("default")


def test_adapters_change_places_with_what_is_trained_whole_beside_them() -> None:
    case, theirs, folder = whole_head()
    _, plain, other = trained("llama")
    inputs = case.inputs(case.ids(2, 9))
    model = nnx.clone(case.ours)
    before, base = arrays_of(model), our_logits(model, inputs)
    model.load_adapter(folder, "whole").load_adapter(other, "plain")
    wanted = {"whole": their_logits(theirs, inputs), "plain": their_logits(plain, inputs)}
    for name in ("whole", "plain", "whole", "plain"):
        model.set_adapter(name)
        close(our_logits(model, inputs), wanted[name], FORWARD, name)
        assert ("lm_head/kernel" in tree_of(model)) is (name == "whole")
        with model.disable_adapters():
            np.testing.assert_array_equal(our_logits(model, inputs), base)
    with pytest.raises(ValueError, match=r"modules_to_save \(whole\) is not supported"):
        model.add_weighted_adapter(["whole", "plain"], [1, 1], "sum")
    model.set_adapter("whole")
    model.delete_adapter("plain")
    model.delete_adapter("whole")
    assert_unharmed(model, before)
    assert nnx.graphdef(model) == nnx.graphdef(case.ours)


def test_folding_keeps_what_was_trained_whole() -> None:
    case, theirs, folder = whole_head()
    model = loaded(case, folder).merge_and_unload()
    assert not model.lora_is_enabled
    mine = model.to_torch()
    for name, tensor in copy.deepcopy(theirs).merge_and_unload().state_dict().items():
        close(mine[name], tensor, WEIGHTS, name)


def test_shared_factors_lie_on_a_mesh_with_their_layers() -> None:
    case, theirs, folder = trained("gpt2")
    inputs = case.inputs(case.ids(2, 9))
    want = their_logits(theirs, inputs)
    model = type(case.ours).from_pretrained(case.folder, sharding_axis_dims=(1, 4, 1, 2, 1), auto_shard_model=True)
    model.load_adapter(folder)
    first = model.transformer.layers[0].self_attn
    assert first.q_proj.lora.a is first.k_proj.lora.a is first.v_proj.lora.a
    assert first.q_proj.lora.b.get_value().sharding.spec == jax.sharding.PartitionSpec(None, "tp")
    close(our_logits(model, inputs), want, FORWARD)
    close(our_logits(model.gather_model(), inputs), want, FORWARD)
    close(our_logits(loaded(case, folder).shard_model(mesh=model.mesh), inputs), want, FORWARD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pattern": "q_proj", "fused": True}, "leaves out transformer/layers/0/self_attn/k_proj"),
        ({"pattern": "(q|k|v)_proj", "fused": True, "rank_pattern": {"q_proj": 2}}, "their ranks differ"),
        ({"pattern": "q_proj", "modules_to_save": ("nrom",)}, "matches no module; nearest: .*norm"),
        ({"pattern": "q_proj", "modules_to_save": ("dropout",)}, "has no parameters of its own"),
        ({"modules_to_save": "norm"}, "expected a list of regular expressions"),
        ({"fused": 1}, "expected True or False"),
    ],
)
def test_what_cannot_be_is_named_and_changes_nothing(config: dict[str, Any], message: str) -> None:
    model = nnx.clone(pair("gpt2", FAMILIES["gpt2"].main.name).ours)
    before = arrays_of(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("default", LoraConfig(**config))
    assert_unharmed(model, before)
