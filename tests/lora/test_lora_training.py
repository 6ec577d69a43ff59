"""Training adapters: what learns, what is saved, and what it is put back onto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easydel import CheckpointError, EasyDeLState, eLargeModel
from easydel.infra.state_arrays import named_arrays
from easydel.infra.state_base import fingerprint
from easydel.paths import flatten, named_variables
from easydel.sharding import create_mesh
from easydel.training.step import TrainStep
from tests.compiled import compiled_once
from tests.lora.tiny import arrays_of, randomise
from tests.quantization.tiny import IDS, llama, logits

Q_AND_V = ".*q_proj.*|.*v_proj.*"
BATCH = {"input_ids": IDS, "labels": IDS}
TX = optax.adamw(1e-2)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: Any) -> Any:
    """Runs and steps anew are the same programs."""
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


CASES = pytest.mark.parametrize(
    ("method", "scan"),
    [
        ("nf4", True),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param("nf4", False, marks=pytest.mark.slow),
    ],
)


def base(method: str | None = None, **config: Any) -> Any:
    model = llama(**config)
    return model.quantize(method) if method else model


def adapted(model: Any, **options: Any) -> Any:
    return model.apply_lora_to_layers(8, 16, Q_AND_V, **{"lora_dropout": 0.1} | options)


def assert_same_state(one: Any, other: Any) -> None:
    left, right = named_arrays(one), named_arrays(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@CASES
def test_adapters_alone_learn_and_are_saved(method: str | None, scan: bool, tmp_path: Path) -> None:
    own = base(method, scan_layers=scan)
    model = adapted(nnx.clone(own))
    before = arrays_of(model)
    step = TrainStep(model.to_state(TX))
    losses = [float(step(BATCH)["loss"]) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.2
    state = step.state
    for path, value in arrays_of(state.model).items():
        if "/lora/" not in path:
            np.testing.assert_array_equal(value, before[path], err_msg=path)
    lora = flatten(state.trainable_params, by_layer=False)
    assert lora.keys() == named_variables(model, nnx.LoRAParam, by_layer=False).keys()
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.nbytes for leaf in lora.values())
    state.save_state(tmp_path / "state")
    saved = {name for name in named_arrays(state) if name.startswith(("params/", "other/"))}
    assert saved
    assert all("/lora/" in name for name in saved)
    held = arrays_of(own)
    loaded = EasyDeLState.load_state(tmp_path / "state", TX, model=own)
    assert arrays_of(own).keys() == held.keys()  # left as it is
    assert_same_state(loaded, state)
    np.testing.assert_array_equal(logits(loaded.model), logits(state.model))
    onto_adapted = EasyDeLState.load_state(tmp_path / "state", TX, model=adapted(nnx.clone(own)))
    assert_same_state(onto_adapted, state)
    with pytest.raises(CheckpointError, match=r"load_state\(…, model=base\)"):
        EasyDeLState.load_state(tmp_path / "state", TX)
    other = nnx.clone(own)
    scale = other.model.norm.scale
    scale.set_value(scale.get_value().at[0].add(1e-6))
    with pytest.raises(CheckpointError, match="trained on another base"):
        EasyDeLState.load_state(tmp_path / "state", TX, model=other)
    with pytest.raises(CheckpointError, match=r"the model has adapters of .* layers with .*16"):
        EasyDeLState.load_state(tmp_path / "state", TX, model=adapted(nnx.clone(own), rank_pattern={"q_proj": 2}))
    with pytest.raises(ValueError, match="leave out model_class"):
        EasyDeLState.load_state(tmp_path / "state", TX, model=own, model_class=type(own))


def test_a_whole_state_takes_no_base(tmp_path: Path) -> None:
    base().to_state(optax.sgd(0.1)).save_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="holds a whole model"):
        EasyDeLState.load_state(tmp_path / "state", optax.sgd(0.1), model=base())


def test_which_parameters_train() -> None:
    model = adapted(base())
    names = lambda state: {path.rpartition("/")[2] for path in flatten(state.trainable_params)}  # noqa: E731
    assert names(model.to_state(TX)) == {"a", "b"}
    assert names(model.to_state(TX, frozen="lora/a$")) == {"b"}
    assert names(model.to_state(TX, trainable=["lora/", "norm/scale"])) == {"a", "b", "scale"}
    with pytest.raises(ValueError, match="leaves no adapter to train"):
        model.to_state(TX, frozen="lora/")


def test_gradients_reach_adapters_through_quantized_weights() -> None:
    """Those of a base whose codes stand for the same weights, up to how their products round."""
    quantized = base("nf4", num_hidden_layers=1)
    floats = nnx.clone(quantized).dequantize()
    found = []
    for model in (quantized, floats):
        model = randomise(adapted(model, lora_dropout=0.0))
        state, pure = model.to_state(TX), model.pure_transform_fn()
        gradient = jax.jit(
            jax.grad(lambda lora, state=state, pure=pure: pure(state.with_params(lora).params, BATCH).loss)
        )
        found.append(flatten(gradient(state.trainable_params)))
    for path, want in found[1].items():
        np.testing.assert_allclose(found[0][path], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=path)
        assert np.abs(want).max() > 0


def test_the_base_gets_no_gradients() -> None:
    """The step's program has no product as large as a kernel's gradient."""
    model = adapted(base(num_hidden_layers=1), lora_dropout=0.0)
    state = model.to_state(TX)

    def flops(state: Any) -> float:
        def loss(params: Any) -> Any:
            return state.with_params(params).model.compute_loss(**BATCH)[0]

        compiled = jax.jit(jax.grad(loss)).lower(state.trainable_params).compile()
        return compiled.cost_analysis()["flops"]

    full = flops(base(num_hidden_layers=1).to_state(TX))
    # Forward, and backwards to activations and adapters: about two of three products are left.
    assert flops(state) < 0.8 * full


def test_a_fingerprint_sees_every_bit_and_no_placement() -> None:
    model = base("nf4")
    variables = named_variables(model, by_layer=False)
    whole = fingerprint(variables)
    model.shard_model(mesh=create_mesh((1, 2, 1, 4, 1)))
    assert fingerprint(variables) == whole
    model.gather_model()
    for path in ("model/layers/1/mlp/up_proj/codes", "model/embed_tokens/embedding"):
        variable, held = variables[path], variables[path].get_value()
        swapped = held.at[0].set(held[1]).at[1].set(held[0])
        variable.set_value(swapped)
        assert fingerprint(variables) != whole
        variable.set_value(held)
    assert fingerprint(variables) == whole


def test_a_run_saves_adapters_and_goes_on_from_them(tmp_path: Path) -> None:
    from easydel.errors import CheckpointError as Broken
    from tests.training.runs import tiny_llama, trainer

    def run(steps: int, folder: Path, alpha: float = 16) -> Any:
        model = tiny_llama().apply_lora_to_layers(4, alpha, Q_AND_V, lora_dropout=0.1)
        return trainer(folder, model, schedule="constant", warmup_steps=0, max_steps=steps, save_model=steps == 6)

    whole = run(6, tmp_path / "whole").train()
    run(3, tmp_path / "parts").train()
    with pytest.raises(Broken, match="holds adapters of"):
        run(6, tmp_path / "parts", alpha=8).train()
    result = run(6, tmp_path / "parts").train()
    assert_same_state(result.state, whole.state)
    sizes = sum(file.stat().st_size for file in (tmp_path / "parts" / "checkpoints" / "6").rglob("*"))
    from easydel import LlamaForCausalLM

    merged = LlamaForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert not merged.lora_is_enabled
    ids = jnp.asarray(np.arange(12)[None] % 32)
    np.testing.assert_allclose(logits(merged, ids), logits(result.model, ids), rtol=0, atol=1e-5)
    assert sizes > 0


def test_runs_have_sections_for_both(tmp_path: Path) -> None:
    from tests.training.runs import SIZES

    def made(**sections: Any) -> Any:
        model = {"model_type": "llama", "config": dict(SIZES), "tokenizer": "stdlib-4m"}
        return eLargeModel({"model": model, "training": {"output_dir": str(tmp_path)}, "mesh": {"dp": -1}, **sections})

    run = made(
        lora={"rank": 4, "pattern": Q_AND_V, "use_rslora": True}, quantization={"method": "8bit", "group_size": 8}
    )
    model = run.build_model()
    assert model.is_quantized
    assert model.quantization_report.group_size == 8
    assert model.active_adapter == "default"
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.lora.a.get_value().shape[-1], float(layer.lora.scale.get_value())) == (4, 8.0)
    assert not made().build_model().lora_is_enabled
    for sections, message in (
        ({"lora": {"rank": 0}}, "lora: lora_rank=0"),
        ({"lora": {"rnak": 1}}, "lora has no field 'rnak'; did you mean 'rank"),
        ({"quantization": {"method": "nf5"}}, "quantization: .*nf5"),
        ({"quantization": {"group_size": 0}}, "quantization: "),
    ):
        with pytest.raises(ValueError, match=message):
            made(**sections)
