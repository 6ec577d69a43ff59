"""While loading, initialising and saving, no device holds more than its share and the largest tensor."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from easydel import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from easydel.hub import load, save
from easydel.paths import named_variables
from easydel.sharding import creation
from tests.sharding.held import Peak, held, measured, mesh_named, zeros

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+ mesh axis\(es\) dropped")
LLAMA = LlamaConfig(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": (LlamaForCausalLM, LLAMA),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=1024, n_embd=256, n_layer=2, n_head=4, n_positions=64)),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        ),
    ),
}  # fmt: skip
MESHES = ("fsdp", "mixed", "tp")
SCANNED = LlamaForCausalLM, LlamaConfig.from_dict({**LLAMA.to_dict(), "scan_layers": True})


def bound(model) -> int:
    """Bytes: a device's share, the largest tensor whole, and what counters and keys take."""
    share = model.explain_sharding(mesh=model.mesh).fullest_device[1]
    return share + max(v.get_value().nbytes for v in named_variables(model, nnx.Param).values()) + 4096


def check(peak: Peak, model, *, share: int) -> None:
    assert peak.samples > 10
    assert max(peak.bytes.values()) <= share
    total = sum(v.get_value().nbytes for v in named_variables(model, nnx.Param).values())
    assert bound(model) < total / 2, "the model is too small for this to mean anything"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Name → a checkpoint of that model, every number another."""
    folders = {}
    for name, (cls, config) in MODELS.items():
        model = zeros(cls, config)
        for seed, variable in enumerate(named_variables(model, nnx.Param).values()):
            shape = variable.get_value().shape
            variable.set_value(jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32)))
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def pairs(default, rest):
    """Parameters of a test: those it always runs with, and those that are slow."""
    return [*default, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in rest if pair not in default)]


@pytest.mark.parametrize(
    ("name", "which"),
    pairs([("llama", "fsdp"), ("mixtral", "mixed")], itertools.product(MODELS, MESHES)),
)
def test_loading_and_saving(name, which, checkpoint, tmp_path, monkeypatch):
    cls, mesh = MODELS[name][0], mesh_named(which)
    with measured(monkeypatch, load, "place_link") as peak:
        model = cls.from_pretrained(checkpoint[name], auto_shard_model=True, mesh=mesh)
    check(peak, model, share=bound(model))
    assert held(model) == model.explain_sharding().bytes_per_device

    with measured(monkeypatch, save, "host_array", "link_arrays") as peak:
        model.save_pretrained(tmp_path, max_shard_size="5MB")
    largest = bound(model) - model.explain_sharding().fullest_device[1]
    check(peak, model, share=largest)  # over what the model itself holds
    again, first = cls.from_pretrained(tmp_path), cls.from_pretrained(checkpoint[name])
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


@pytest.mark.parametrize(
    ("name", "which"),
    pairs([("scanned", "tp")], [("llama", "fsdp"), ("llama", "mixed"), ("llama", "tp"), ("mixtral", "experts")]),
)
def test_initialising(name, which, monkeypatch):
    cls, config = SCANNED if name == "scanned" else MODELS[name]
    with measured(monkeypatch, creation, "_run") as peak:
        model = cls.sharded_init(config, mesh_named(which))
    check(peak, model, share=bound(model))


def test_new_parameters_of_a_load(checkpoint, tmp_path, monkeypatch):
    LlamaForCausalLM.from_pretrained(checkpoint["llama"]).model.save_pretrained(tmp_path)
    with measured(monkeypatch, creation, "_run") as peak:
        model = LlamaForCausalLM.from_pretrained(tmp_path, mesh=mesh_named("tp"), allow_new=["lm_head"])
    check(peak, model, share=bound(model))
    alone = LlamaForCausalLM.from_pretrained(tmp_path, allow_new=["lm_head"])
    np.testing.assert_array_equal(model.lm_head.kernel.get_value(), alone.lm_head.kernel.get_value())


def test_the_measure_sees_a_whole_model(checkpoint, monkeypatch):
    """Gathering brings all onto one device, on purpose."""
    model = LlamaForCausalLM.from_pretrained(checkpoint["llama"], mesh=mesh_named("tp"))
    most = bound(model)
    with measured(monkeypatch, load, "place_link") as peak:
        model.gather_model()
    assert peak.bytes[0] > most
    assert max(size for device, size in peak.bytes.items() if device) <= 4096
