"""Every family of the table: layers under a scan compute what layers one by one compute."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from easydel.paths import flatten
from tests.models.pairs import Jitted, Pair, array, close, equal, load_ours, pair
from tests.models.table import cases

SAME = 1e-5  # the same sums, fused otherwise: 2e-6 were seen
# Weights changed by 6e-8, a rounding, move its logits by 2e-5 and its gradients by 9e-5: products of decays amplify.
SENSITIVE = {"mamba": 1e-4}
DEPTH = {
    "gpt2": {"n_layer": 3},
    "gemma2": {"num_hidden_layers": 5},
    "gpt_oss": {"num_hidden_layers": 5},
    "olmo3": {"num_hidden_layers": 5, "layer_types": (["sliding_attention", "full_attention"] * 3)[:5]},
    "t5": {"num_layers": 3, "num_decoder_layers": 2},
    "bart": {"encoder_layers": 3},
}
MESH = (1, 2, 1, 4, 1)
MASK = np.asarray([[1] * 9, [0] * 3 + [1] * 6] * 2, np.int32)


def deep(family: str, variant: str) -> Pair:
    """Return a pair with three layers, or two periods of layers and one more."""
    return pair(family, variant, **DEPTH.get(family, {"num_hidden_layers": 3}))


@functools.cache
def scanned(family: str, variant: str) -> Any:
    case = deep(family, variant)
    return load_ours(case.family, case.task, case.folder, scan_layers=True)


def everything(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return all outputs of a forward pass but the cache, and the gradients."""
    pure = model.pure_transform_fn()

    @jax.jit
    def run(params: Any, inputs: Any) -> Any:
        def loss(params: Any) -> Any:
            out = pure(params, inputs, output_hidden_states=True, output_attentions=True)
            return out.loss, out

        return jax.grad(loss, has_aux=True)(params)

    gradients, out = run(model.params, inputs)
    return out, gradients


@functools.cache
def reference(family: str, variant: str) -> tuple[Any, dict[str, Any]]:
    case = deep(family, variant)
    return everything(case.ours, case.labelled(case.ids(4, 9), MASK))


def compare(model: Any, family: str, variant: str) -> None:
    case = deep(family, variant)
    want, want_gradients = reference(family, variant)
    got, gradients = everything(model, case.labelled(case.ids(4, 9), MASK))
    assert list(got) == list(want)
    same = SENSITIVE.get(family, SAME)
    for name in want:
        jax.tree.map(lambda one, two, name=name: close(one, two, same, name), got[name], want[name])
    wanted = flatten(want_gradients)
    largest = max(np.abs(array(gradient)).max() for gradient in wanted.values())
    gradients = flatten(gradients)
    assert gradients.keys() == wanted.keys()
    for path, gradient in gradients.items():
        close(gradient, wanted[path], same, path, least=largest)


def identical(one: Any, two: Any) -> None:
    left, right = flatten(one.params), flatten(two.params)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        equal(left[path], right[path], path)


@pytest.mark.proof("scan")
@pytest.mark.parametrize(("family", "variant"), cases("scan"))
def test_outputs_and_gradients_under_a_scan(family: str, variant: str) -> None:
    case, model = deep(family, variant), scanned(family, variant)
    assert any(":" in path for path in flatten(model.params, by_layer=False))
    compare(model, family, variant)
    assert model.flops_per_token(1, 8) == case.ours.flops_per_token(1, 8)


@pytest.mark.proof("scan")
@pytest.mark.parametrize(("family", "variant"), cases("scan"))
def test_outputs_and_gradients_under_a_scan_on_eight_devices(family: str, variant: str) -> None:
    case = deep(family, variant)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(axis|axes).*")  # sizes of a tiny model need not divide
        one, sharded = (
            load_ours(
                case.family, case.task, case.folder, scan_layers=scan, sharding_axis_dims=MESH, auto_shard_model=True
            )
            for scan in (False, True)
        )
    identical(sharded, case.ours)
    places = {path: leaf.sharding for path, leaf in flatten(one.params).items()}
    for path, leaf in flatten(sharded.params).items():
        assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), path
    compare(sharded, family, variant)
    identical(sharded.gather_model(), case.ours)


@pytest.mark.proof("scan_cache")
@pytest.mark.parametrize(("family", "variant"), cases("scan_cache"))
def test_caches_and_generation_under_a_scan(family: str, variant: str) -> None:
    case, model = deep(family, variant), scanned(family, variant)
    ids, mask, run = case.ids(2, 9), MASK[:2], Jitted(model)
    want = np.asarray(case.run(**case.continuing(ids, mask)).logits)
    cache, done, parts = model.init_operations_cache(2, 12), 0, []
    for size in (5, 1, 3):
        given = case.continuing(ids[:, done : done + size], mask[:, done : done + size], first=done == 0)
        out = run(**given, cache=cache)
        cache, done = out.cache, done + size
        parts.append(np.asarray(out.logits))
    close(np.concatenate(parts, axis=1)[mask == 1], want[mask == 1], SAME)
    assert len(cache.layers) == len(list(cache.layers)) == len(case.ours.get_decoder().layers)
    one_by_one, scanned_tokens = (
        owner.generate(**case.continuing(ids, mask), max_new_tokens=8, do_sample=False).sequences
        for owner in (case.ours, model)
    )
    equal(scanned_tokens, one_by_one, "tokens")


@pytest.mark.proof("scan")
@pytest.mark.parametrize(("family", "variant"), cases("scan"))
def test_files_and_trees_are_those_of_layers_one_by_one(family: str, variant: str, tmp_path: Path) -> None:
    case, model = deep(family, variant), scanned(family, variant)
    identical(model, case.ours)
    model.save_pretrained(tmp_path)
    identical(load_ours(case.family, case.task, tmp_path), case.ours)
    tensors = case.ours.to_torch()
    assert all(bool((tensor == tensors[name]).all()) for name, tensor in model.to_torch().items())
    new = [type(case.ours)(config) for config in (case.ours.config, model.config)]
    identical(*new)
    new[1].merge_params_dict(case.ours.params)
    identical(new[1], case.ours)
    new[0].merge_params_dict(new[1].params)
    identical(new[0], case.ours)
