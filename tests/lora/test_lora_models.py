"""Adapters in whole models: where they go, folding, names, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from easydel import CompilationCounter, LoraConfig
from easydel.errors import UnsupportedError
from easydel.lora.describe import described
from easydel.paths import flatten, named_variables, nest
from tests.lora.tiny import arrays_of, assert_unharmed, randomise
from tests.quantization.tiny import LLAMA, llama, logits

Q_AND_V = ".*q_proj.*|.*v_proj.*"
SAME = 1e-6  # sums of 64 products, arranged otherwise: 3e-7 were seen
SLOW_SCAN = pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["list", "scan"])
EVERY = pytest.mark.parametrize(
    ("method", "scan"),
    [(None, False), ("nf4", True)]
    + [
        pytest.param(method, scan, marks=pytest.mark.slow)
        for method, scan in (
            (None, True),
            ("nf4", False),
            ("8bit", False),
            ("8bit", True),
            ("a8q", False),
            ("a4q", True),
        )
    ],
)


def adapted(
    pattern: str | None = Q_AND_V, method: str | None = None, scan: bool = False, layers: int = 2, **options: Any
) -> Any:
    model = llama(scan_layers=scan, num_hidden_layers=layers)
    if method:
        model.quantize(method)
    return model.apply_lora_to_layers(8, 16, pattern, **options)


@EVERY
def test_step_zero_is_exact_and_splitting_changes_nothing(method: str | None, scan: bool) -> None:
    model = llama(scan_layers=scan)
    if method:
        model.quantize(method)
    before = logits(model)
    assert not model.lora_is_enabled
    assert model.apply_lora_to_layers(8, 16, Q_AND_V) is model
    assert model.lora_is_enabled
    np.testing.assert_array_equal(logits(model), before)
    held = arrays_of(model)
    base, lora = model.split_lora_params()
    assert {path.rpartition("/")[2] for path in flatten(lora)} == {"a", "b"}
    assert flatten(base).keys() | flatten(lora).keys() == flatten(model.params).keys()
    assert model.merge_lora_params(lora) is model
    model.merge_lora_params()
    assert_unharmed(model, held)
    zero = jax.tree.map(np.zeros_like, lora)
    randomise(model)
    assert np.abs(logits(model) - before).max() > 1e-2
    model.merge_lora_params(zero)
    np.testing.assert_array_equal(logits(model), before)


def test_a_scan_gets_the_adapters_that_layers_one_by_one_get() -> None:
    one, other = adapted(scan=False), adapted(scan=True)
    left, right = (
        {path: np.asarray(v.get_value()) for path, v in named_variables(m, nnx.LoRAParam).items()} for m in (one, other)
    )
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path)
    one, other = (randomise(model) for model in (one, other))
    np.testing.assert_allclose(logits(one), logits(other), rtol=0, atol=SAME)


def test_the_default_pattern_is_every_linear_layer_but_the_head() -> None:
    model = adapted(None)
    layers = {path.rpartition("/lora/")[0].split("layers/")[-1] for path in flatten(model.split_lora_params()[1])}
    assert layers == {
        f"{n}/{each}"
        for n in (0, 1)
        for each in (
            *(f"self_attn/{name}_proj" for name in "qkvo"),
            *(f"mlp/{name}_proj" for name in ("gate", "up", "down")),
        )
    }


@SLOW_SCAN
def test_merged_is_unmerged_and_the_base_comes_back_bit_by_bit(scan: bool) -> None:
    layers = 2 if scan else 1
    for options in ({}, {"use_dora": True}):
        model = randomise(adapted(None, scan=scan, layers=layers, **options))
        before, want = arrays_of(model), logits(model)
        assert model.merge_adapter() is model
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=SAME)
        with pytest.raises(ValueError, match="merged already"):
            model.merge_adapter()
        for verb in (
            lambda m: m.to_state(optax.sgd(1.0)),
            lambda m: m.set_adapter("default"),
            lambda m: m.add_adapter("other"),
            lambda m: m.delete_adapter("default"),
            lambda m: m.disable_adapters().__enter__(),
        ):
            with pytest.raises(ValueError, match="unmerge_adapter"):
                verb(model)
        with pytest.raises(ValueError, match="only the very model that was merged"):
            nnx.clone(model).unmerge_adapter()
        model.unmerge_adapter()
        assert_unharmed(model, before)
        np.testing.assert_array_equal(logits(model), want)
        with pytest.raises(ValueError, match="not merged"):
            model.unmerge_adapter()
        assert model.unwrap_lora_to_layers() is model
        assert not model.lora_is_enabled
        assert model.graphdef == llama(scan_layers=scan, num_hidden_layers=layers).graphdef
        np.testing.assert_allclose(logits(model), want, rtol=0, atol=SAME)
        with pytest.raises(ValueError, match="no adapters"):
            model.merge_and_unload()


@SLOW_SCAN
def test_folding_into_quantized_weights_says_what_it_cost(scan: bool) -> None:
    model = randomise(adapted(method="nf4", scan=scan))
    before = arrays_of(model)
    from easydel.lora.adapters import adapted_layers
    from easydel.lora.weights import scaled_product, weight_matrix

    exact = {
        p: np.asarray(weight_matrix(x) + scaled_product(x.lora), np.float64) for p, x in adapted_layers(model).items()
    }
    with pytest.warns(UserWarning, match=r"4 'nf4' layers quantized their weights once more.*at most 0\.\d+ "):
        model.merge_adapter()
    report = model.lora_fold_report
    assert len(report.errors) == 4
    layers = adapted_layers(model)
    for path, want in exact.items():
        got = np.asarray(weight_matrix(layers[path]), np.float64)
        error = np.linalg.norm(got - want, axis=(-2, -1)) / np.linalg.norm(want, axis=(-2, -1))
        from easydel.stacked import layer_paths

        told = [report.errors[each] for each in layer_paths(path) or [path]]
        np.testing.assert_allclose(error.reshape(-1), told, rtol=1e-4)  # float32 sums of 4096 squares
    model.unmerge_adapter()
    assert_unharmed(model, before)
    with pytest.warns(UserWarning, match="at most"):
        model.unwrap_lora_to_layers()
    assert model.is_quantized
    assert model.quantization_report.largest_error == pytest.approx(
        max([report.largest_error, model.quantization_report.largest_error])
    )


def test_folding_into_floats_reports_nothing() -> None:
    model = randomise(adapted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unwrap_lora_to_layers()
    assert model.lora_fold_report is None


def test_adapters_are_exchanged_without_compiling() -> None:
    model = randomise(adapted(layers=1), seed=1)
    assert (model.adapter_names, model.active_adapter) == (["default"], "default")
    plain, first = logits(llama(num_hidden_layers=1)), logits(model)
    model.add_adapter("second", LoraConfig(8, 4, Q_AND_V), rngs=nnx.Rngs(7))
    assert (model.adapter_names, model.active_adapter) == (["default", "second"], "default")
    np.testing.assert_array_equal(logits(model), first)
    with CompilationCounter() as counter:
        assert model.set_adapter("second") is model
        fresh = logits(model)
        model.set_adapter("default")
        again = logits(model)
    assert counter.count == 0
    np.testing.assert_array_equal(fresh, plain)  # another alpha, numbers not trained yet
    np.testing.assert_array_equal(again, first)
    model.set_adapter("second")
    assert model.adapter_names == ["second", "default"]
    model.add_adapter("wide", LoraConfig(3, 4, "mlp", use_dora=True))
    model.set_adapter("wide")  # other layers: what was there comes off
    assert {path.split("/")[3] for path in flatten(model.split_lora_params()[1])} == {"mlp"}
    model.set_adapter("default")
    np.testing.assert_array_equal(logits(model), first)
    with model.disable_adapters():
        np.testing.assert_array_equal(logits(model), plain)
        with pytest.raises(ValueError, match="disabled"):
            model.set_adapter("second")
        with pytest.raises(ValueError, match="disabled"):
            model.merge_adapter()
    np.testing.assert_array_equal(logits(model), first)
    with pytest.raises(ValueError, match="'default' is the active adapter"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"no adapter 'secnd', but .*did you mean 'second'"):
        model.set_adapter("secnd")
    with pytest.raises(ValueError, match="there is an adapter 'wide' already"):
        model.add_adapter("wide", LoraConfig(pattern=Q_AND_V))
    model.delete_adapter("wide").delete_adapter("second").delete_adapter("default")
    assert not model.lora_is_enabled
    assert model.adapter_names == []
    np.testing.assert_array_equal(logits(model), plain)


def test_copies_carry_the_active_adapter() -> None:
    model = randomise(adapted())
    model.add_adapter("second", LoraConfig(8, 4, Q_AND_V))
    copied = nnx.clone(model)
    assert copied.adapter_names == ["default"]
    np.testing.assert_array_equal(logits(copied), logits(model))


def test_a_swap_moves_no_numbers() -> None:
    """The arrays are those that were there before; how long that takes: `python -m benchmarks.lora`."""
    model = adapted()
    model.add_adapter("second", LoraConfig(8, 4, Q_AND_V))

    def held() -> dict[str, jax.Array]:
        return {path: variable.get_value() for path, variable in named_variables(model).items()}

    first = held()
    with CompilationCounter() as compiled:
        model.set_adapter("second")
        other = held()
        model.set_adapter("default")
        back = held()
    assert compiled.count == 0
    changed = {path for path, array in other.items() if array is not first[path]}
    assert changed == {path for path in first if "/lora/" in path}
    assert all(back[path] is array for path, array in first.items())


def test_weighted_sums() -> None:
    model = randomise(adapted(layers=1), seed=1, scale=0.3)
    model.add_adapter("second", LoraConfig(4, 4, Q_AND_V + "|o_proj")).set_adapter("second")
    randomise(model, seed=2, scale=0.3)
    from easydel.lora import get_adapter
    from easydel.lora.weights import scaled_product

    class Held:
        def __init__(self, arrays: Any) -> None:
            self.a, self.b, self.scale = (nnx.Param(arrays[name]) for name in ("a", "b", "scale"))

    def products(name: str) -> dict[str, np.ndarray]:
        return {path: np.asarray(scaled_product(Held(x))) for path, x in get_adapter(model, name).arrays.items()}

    first, second = products("default"), products("second")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type="cat")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "best", combination_type="svd", svd_rank=3)
    for path, got in products("both").items():
        want = 0.7 * first.get(path, 0) - 0.4 * second[path]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    for path, got in products("best").items():
        u, s, vt = np.linalg.svd(np.float64(0.7 * first.get(path, 0) - 0.4 * second[path]))
        want = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * s[0])  # singular vectors in float32
    config = described(model, get_adapter(model, "both"))
    assert (config.rank, config.alpha) == (12, 12)
    assert {config.rank_of(path) for path in first} == {12}
    with pytest.raises(ValueError, match="needs equal ranks"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "sum", combination_type="linear")
    with pytest.raises(UnsupportedError, match="combination_type='ties'"):
        model.add_weighted_adapter(["default"], [1], "sum", combination_type="ties")
    with pytest.raises(ValueError, match="a weight for each"):
        model.add_weighted_adapter(["default"], [1, 2], "sum")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.add_weighted_adapter(["third"], [1], "sum")
    assert model.adapter_names == ["second", "default", "both", "best"]


def test_what_cannot_be_done_is_refused_and_harms_nothing() -> None:
    model = llama()
    before = arrays_of(model)
    for options, message in (
        ({"lora_pattern": "q_porj"}, "'q_porj' matches no linear layer; nearest: .*q_proj"),
        ({"lora_pattern": "input_layernorm"}, "matches no linear layer, but .*input_layernorm, a "),
        ({"lora_pattern": "embed_tokens"}, "embeddings get adapters with embeddings=True"),
        ({"lora_rank": 0}, "lora_rank=0: the rank"),
        ({"lora_pattern": "q_proj", "rank_pattern": {"k_proj": 2}}, "rank_pattern: the pattern 'k_proj' matches no"),
        ({"lora_pattern": "q_proj", "alpha_pattern": {"k_proj": 2}}, "alpha_pattern: the pattern 'k_proj'"),
        ({"adapter_name": "a/b"}, "adapter_name='a/b'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply_lora_to_layers(**options)
        assert_unharmed(model, before)
    for verb in ("merge_adapter", "unmerge_adapter", "unwrap_lora_to_layers", "split_lora_params", "merge_lora_params"):
        with pytest.raises(ValueError, match="the model has no adapters"):
            getattr(model, verb)()
    with pytest.raises(ValueError, match="none at all"):
        model.set_adapter("default")
    with pytest.raises(UnsupportedError, match="adapting some of the layers that are stored stacked"):
        llama(scan_layers=True).apply_lora_to_layers(lora_pattern="layers/0/.*q_proj")
    with pytest.raises(UnsupportedError, match="stored stacked, so that adapters of the ranks"):
        llama(scan_layers=True).apply_lora_to_layers(lora_pattern="q_proj", rank_pattern={"layers/0": 2})
    with pytest.raises(UnsupportedError, match="shapes only"):
        type(model).lazy_init(model.config).apply_lora_to_layers()
    with pytest.raises(TypeError, match="expected a LoraConfig"):
        model.add_adapter("x", {"rank": 8})
    assert_unharmed(model, before)


def test_what_adapters_forbid(tmp_path: Any) -> None:
    model = randomise(adapted())
    before = arrays_of(model)
    with pytest.raises(ValueError, match=r"has adapters already .*add_adapter"):
        model.apply_lora_to_layers()
    with pytest.raises(ValueError, match=r"save_adapter\(\) writes the adapter alone, merge_and_unload"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.to_torch()
    with pytest.raises(ValueError, match="quantize before applying adapters"):
        model.quantize("nf4")
    with pytest.raises(ValueError, match="merge_and_unload"):
        adapted(method="nf4").dequantize()
    _, lora = model.split_lora_params()
    with pytest.raises(ValueError, match=r"adapters only, got .*norm/scale"):
        model.merge_lora_params({"model": {"norm": {"scale": np.zeros(64)}}})
    path = "model/layers/0/self_attn/q_proj/lora/a"
    with pytest.raises(ValueError, match=rf"{path}: expected shape \(64, 8\), got \(64, 4\)"):
        model.merge_lora_params(nest({path: np.zeros((64, 4), np.float32)}))
    assert_unharmed(model, before)
    bad = jax.tree.map(lambda x: x * np.nan, lora)
    model.merge_lora_params(bad)
    with pytest.raises(ValueError, match="infinite or undefined"):
        model.unwrap_lora_to_layers()
    assert model.lora_is_enabled


def test_a_merged_model_is_saved_with_its_adapters_folded(tmp_path: Any) -> None:
    model = randomise(adapted())
    want = logits(model)
    model.merge_adapter().save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert not loaded.lora_is_enabled
    np.testing.assert_allclose(logits(loaded), want, rtol=0, atol=SAME)


def test_tied_weights_are_untied(tmp_path: Any) -> None:
    for pattern, options in (("lm_head", {}), ("embed_tokens", {"embeddings": True})):
        model = llama(tie_word_embeddings=True, num_hidden_layers=1)
        config, before = model.config, logits(model)
        with pytest.warns(UserWarning, match=r"untied.*lm_head is a copy"):
            model.apply_lora_to_layers(4, 8, pattern, **options)
        assert config.tie_word_embeddings  # others may hold it
        assert not model.config.tie_word_embeddings
        np.testing.assert_allclose(logits(model), before, rtol=0, atol=SAME)  # a head computes in another order
        randomise(model)
        want = logits(model)
        assert np.abs(want - before).max() > 1e-2
        model.merge_and_unload().save_pretrained(tmp_path / pattern)
        loaded = type(model).from_pretrained(tmp_path / pattern)
        assert not loaded.config.tie_word_embeddings
        np.testing.assert_allclose(logits(loaded), want, rtol=0, atol=SAME)
    model = llama(tie_word_embeddings=True, num_hidden_layers=1)
    graphdef = model.graphdef
    with pytest.raises(ValueError, match="rank_pattern"):
        model.apply_lora_to_layers(4, 8, "lm_head", rank_pattern={"q_proj": 2})
    assert model.graphdef == graphdef
    assert model.config.tie_word_embeddings
    model.apply_lora_to_layers(4, 8, Q_AND_V)  # neither is meant
    assert model.config.tie_word_embeddings


def test_an_adapted_vocabulary_is_not_resized() -> None:
    model = llama().apply_lora_to_layers(lora_pattern="lm_head")
    before = arrays_of(model)
    with pytest.raises(UnsupportedError, match="lm_head"):
        model.resize_token_embeddings(LLAMA["vocab_size"] + 8)
    assert_unharmed(model, before)
