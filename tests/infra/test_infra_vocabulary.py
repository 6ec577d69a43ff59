"""Another size of the vocabulary, and the parts of a model, against transformers and plain numpy."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

import easydel
from easydel import EasyDeLBaseConfig, EasyDeLBaseModule, TaskType, UnsupportedError
from easydel.infra.resizing import NOISE, drawn_like, target_size
from easydel.paths import flatten, named_variables, nest
from tests.spec.user_models import MyModel, MyModelConfig

P = PartitionSpec
OLD = 24
NEW = 32
IDS = np.array([[5, 8, 13, 21], [3, 1, 4, 1]])
SMALL = {
    "hidden_size": 8,
    "intermediate_size": OLD,  # as many as tokens: sizes must not be taken for an answer
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": OLD,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": OLD, "n_positions": OLD}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SMALL),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2 | {"bos_token_id": None, "eos_token_id": None}),
}
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]


def fresh(family: str, tied: bool, **fields):
    config, cls, options = FAMILIES[family]
    made = getattr(easydel, config)(**options | {"tie_word_embeddings": tied} | fields)
    return getattr(easydel, cls)(made, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, state, ids):
    out = nnx.merge(graphdef, state)(input_ids=ids)
    return getattr(out, "logits", out)


def logits(model, ids=IDS):
    return np.asarray(forward(*nnx.split(model), jnp.asarray(ids)))


def assert_same_logits(ours, theirs):
    # A matrix product of another width adds up the same terms in another order: a few roundings of float32.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def assert_same_arrays(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path], array)


def snapshot(model):
    arrays = {path: variable.get_value() for path, variable in named_variables(model).items()}
    return arrays, nnx.split(model)[0], model.config, copy.deepcopy(model.config)


def assert_unchanged(model, before):
    arrays, graphdef, config, content = before
    now = snapshot(model)
    assert all(now[0][path] is array for path, array in arrays.items())
    assert now[1] == graphdef
    assert now[2] is config
    assert now[2] == content


# ---------------------------------------------------------------------- against transformers
QUICK = {("gpt2", True), ("llama", False)}


@pytest.mark.parametrize(
    ("family", "tied"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_resized_model_is_transformers_resized(family, tied, tmp_path):
    model = fresh(family, tied)
    before, params = logits(model), flatten(model.params)
    model.save_pretrained(tmp_path / "old")
    assert model.resize_token_embeddings(NEW) is model
    after = logits(model)
    assert after.shape == (2, 4, NEW)
    assert_same_logits(after[..., :OLD], before)
    for path, array in flatten(model.params).items():
        kept = np.asarray(array)[tuple(slice(size) for size in params[path].shape)]
        np.testing.assert_array_equal(kept, params[path])

    theirs = getattr(transformers, FAMILIES[family][1]).from_pretrained(tmp_path / "old")
    theirs.resize_token_embeddings(NEW)
    ours = model.to_torch()
    assert {name: tuple(x.shape) for name, x in ours.items()} == {
        name: tuple(x.shape) for name, x in theirs.state_dict().items() if name in ours
    }
    theirs.load_state_dict(ours, strict=True)
    assert theirs.config.vocab_size == model.config.vocab_size == NEW

    model.save_pretrained(tmp_path / "new")
    again = getattr(easydel, FAMILIES[family][1]).from_pretrained(tmp_path / "new")
    assert again.config == model.config
    assert_same_arrays(again.params, model.params)
    loaded = getattr(transformers, FAMILIES[family][1]).from_pretrained(tmp_path / "new").eval()
    assert loaded.config.vocab_size == NEW
    with torch.no_grad():
        np.testing.assert_allclose(after, loaded(torch.tensor(IDS)).logits.numpy(), rtol=1e-4, atol=1e-5)

    model.resize_token_embeddings(OLD)
    assert_same_arrays(model.params, nest(params))
    assert model.config.vocab_size == OLD


@pytest.mark.parametrize("count", [None, 17, 32, 40])
@pytest.mark.parametrize("multiple", [None, 8, 10])
def test_sizes_are_rounded_as_in_transformers(count, multiple):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    theirs.resize_token_embeddings(count, multiple)
    assert target_size(OLD, count, multiple) == theirs.config.vocab_size == len(theirs.lm_head.weight)


def master():
    return nnx.clone(_master())


@functools.cache
def _master():
    return fresh("llama", False)


# ---------------------------------------------------------------------- new vectors
def test_new_vectors_have_the_mean_and_a_trace_of_the_covariance_of_the_old():
    rng, count, draw = np.random.default_rng(0), 20000, jax.jit(drawn_like, static_argnums=(1, 2))
    old = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3))).astype(np.float32)
    for axis, array in ((0, old), (1, old.T)):
        new = np.asarray(draw(jnp.asarray(array), axis, count, jax.random.key(1)))
        new = np.moveaxis(new, axis, 0)
        mean, covariance = old.mean(0), NOISE * np.cov(old.T, bias=True)
        deviation = np.sqrt(np.diag(covariance))
        # Five standard errors of a mean of `count` draws, and the rounding of each draw to float32.
        assert (abs(new.mean(0, dtype=np.float64) - mean) < 5 * deviation / count**0.5 + 1e-7 * abs(mean)).all()
        got = np.cov((new - mean).T.astype(np.float64), bias=True)
        # A covariance of `count` draws is off by about sqrt(2 / count) = 1%; again five of them.
        assert (abs(got - covariance) < 0.05 * np.outer(deviation, deviation)).all()


def test_a_covariance_that_is_not_definite_leaves_the_mean():
    old = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    old[:, 5] = 2.0
    new = np.asarray(drawn_like(jnp.asarray(old), 0, 4, jax.random.key(0)))
    # The mean in float32, however it is summed, to a few roundings.
    np.testing.assert_allclose(new, np.broadcast_to(old.mean(0), (4, 8)), rtol=1e-6)


def test_mean_resizing_puts_tables_heads_and_biases_at_their_mean():
    model = User(rngs=nnx.Rngs(3))
    model.head.bias.set_value(jax.device_put(np.random.default_rng(0).normal(size=OLD).astype(np.float32)))
    old = flatten(jax.tree.map(np.asarray, model.params))
    model.resize_token_embeddings(NEW)
    new = flatten(jax.tree.map(np.asarray, model.params))
    # Three of a thousand draws are beyond three deviations; six hardly ever are, and roundings come on top.
    for path, axis in {"table/embedding": 0, "head/kernel": 1, "head/bias": 0}.items():
        a, b = np.moveaxis(old[path], axis, 0), np.moveaxis(new[path], axis, 0)
        assert np.array_equal(a, b[:OLD])
        assert (abs(b[OLD:] - a.mean(0)) <= 6 * NOISE**0.5 * a.std(0) + 1e-6).all()


def test_without_mean_resizing_the_class_initialises():
    model = master()
    model.resize_token_embeddings(OLD + 400, mean_resizing=False)
    rows, head = np.asarray(model.get_embedding().embedding[...]), np.asarray(model.get_lm_head().kernel[...])
    for new in (rows[OLD:], head[:, OLD:]):
        # 3200 draws of `initializer_range`: their deviation is known to 1/sqrt(6400) = 1.2%, five of which are 6%.
        assert abs(np.std(new) / model.config.initializer_range - 1) < 0.06
        assert abs(np.mean(new)) < 5 * model.config.initializer_range / 3200**0.5
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_rngs_choose_the_draws():
    tables = [
        np.asarray(
            master().resize_token_embeddings(NEW, mean_resizing=mean, rngs=nnx.Rngs(seed)).get_embedding().embedding
        )[OLD:]
        for mean in (True, False)
        for seed in (0, 0, 1)
    ]
    for first, again, other in (tables[:3], tables[3:]):
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


# ---------------------------------------------------------------------- dtype, mesh, programs, states
def test_storage_dtype_stays():
    model = master().to_dtype(jnp.bfloat16)
    before = np.asarray(model.get_lm_head().kernel[...])
    model.resize_token_embeddings(NEW)
    after = np.asarray(model.get_lm_head().kernel[...])
    assert model.get_embedding().embedding.dtype == after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after[:, :OLD], before)


@pytest.mark.parametrize("mean_resizing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_sharded_model_stays_sharded(mean_resizing):
    alone = master().resize_token_embeddings(NEW, mean_resizing=mean_resizing)
    model = sharded().resize_token_embeddings(NEW, mean_resizing=mean_resizing)
    wanted = model._named_shardings()
    for path in ("model/embed_tokens/embedding", "lm_head/kernel"):
        array = flatten(model.params)[path]
        assert array.sharding.is_equivalent_to(flatten(wanted)[path], 2)
        assert not array.sharding.is_fully_replicated
    np.testing.assert_allclose(logits(model), logits(alone), rtol=1e-5, atol=1e-6)  # sums of other orders


def sharded(rules=None):
    model = fresh("llama", False, sharding_axis_dims=(1, 2, 1, 4, 1))
    return model.shard_model(rules)


def test_rules_and_rounding_decide_about_axes():
    model = sharded([("embed", P("tp")), ("lm_head", P(None, "fsdp")), (".*", P())])
    with pytest.warns(UserWarning, match="embed_tokens/embedding: dimension 0 of size 30 is not divisible by tp=4"):
        model.resize_token_embeddings(OLD + 6)
    assert model.get_embedding().embedding.sharding.is_fully_replicated
    assert model.get_lm_head().kernel.sharding.spec == P(None, "fsdp")  # its own: the config's rules are others

    with pytest.warns(UserWarning, match="dropped"):
        model = sharded().resize_token_embeddings(OLD + 1)
    assert model.get_embedding().embedding.sharding.spec == P(None, "fsdp")
    model.resize_token_embeddings(pad_to_multiple_of=4)
    assert model.get_embedding().embedding.sharding.spec == P("tp", "fsdp")  # the rules' again


def test_a_gathered_model_stays_on_one_device():
    model = sharded().gather_model().resize_token_embeddings(OLD + 4)
    assert len(model.get_embedding().embedding.sharding.device_set) == 1


def test_generation_uses_the_new_vocabulary():
    model = fresh("llama", True)
    first = model.generate(IDS, max_new_tokens=3).sequences
    model.resize_token_embeddings(NEW)
    # Opposite and far along the last hidden state: one of the two new tokens always wins.
    table = model.get_embedding().embedding
    changed = np.array(table[...])
    changed[NEW - 2 :] = np.eye(8)[0] * [[1e4], [-1e4]]
    table.set_value(jax.device_put(changed))
    out = np.asarray(model.generate([[1, OLD + 2]], max_new_tokens=3).sequences)
    assert (out[0, 2:] >= NEW - 2).all()
    model.resize_token_embeddings(OLD)
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=3).sequences, first)
    with pytest.raises(ValueError, match=r"\[0, 24\)"):
        model.generate([[OLD]], max_new_tokens=1)


def test_an_earlier_state_and_a_twin_with_the_same_config_are_untouched():
    config = _master().config
    model, twin = type(_master())(config, rngs=nnx.Rngs(0)), type(_master())(config, rngs=nnx.Rngs(0))
    state, before = model.to_state(optax.sgd(0.1)), logits(twin)
    function, batch = model.pure_transform_fn(), {"input_ids": jnp.asarray(IDS)}
    model.resize_token_embeddings(NEW)
    assert config.vocab_size == twin.config.vocab_size == state.model.config.vocab_size == OLD
    np.testing.assert_array_equal(logits(state.model), before)
    np.testing.assert_array_equal(function(state.params, batch).logits, twin(**batch).logits)
    assert model.model.config is model.config
    later = model.to_state(optax.sgd(0.1))
    assert later.params["lm_head"]["kernel"].shape == (8, NEW)


def test_a_resized_model_is_the_class_built_at_that_size():
    """Equal structure, attributes included: equal models share their compiled programs."""
    model = fresh("llama", False, pad_token_id=2).resize_token_embeddings(NEW)
    built = type(model)(model.config, rngs=nnx.Rngs(0))
    assert nnx.split(model)[0] == nnx.split(built)[0]
    assert model.get_embedding().padding_idx == 2
    assert model.get_lm_head().out_features == NEW


# ---------------------------------------------------------------------- classes of users
class User(EasyDeLBaseModule):
    """Names of its own, a rounded table, a buffer and a size that it notes."""

    def __init__(self, config=None, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None, rows=1):
        config = MyModelConfig(vocab_size=OLD, hidden_size=8) if config is None else config
        super().__init__(config, dtype, param_dtype, precision, rngs)
        rounded, width = -(-config.vocab_size // rows) * rows, config.hidden_size
        self.table = nnx.Embed(rounded, width, rngs=rngs)
        self.inner = nnx.Linear(width, OLD, rngs=rngs)  # as wide as there are tokens, but not because of them
        self.outer = nnx.Linear(OLD, width, rngs=rngs)
        self.head = nnx.Linear(width, config.vocab_size, rngs=rngs)
        self.allowed = nnx.Variable(jnp.arange(config.vocab_size) % 2)
        self.num_tokens = config.vocab_size

    def __call__(self, input_ids, attention_mask=None):
        return self.head(self.outer(jnp.tanh(self.inner(self.table(input_ids)))))


class Rounded(User):
    def __init__(self, config=None, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs, rows=16)


def test_the_pages_own_model(tmp_path):
    model = MyModel(MyModelConfig(), rngs=nnx.Rngs(0))  # its `up` is as wide as the vocabulary
    before = logits(model)
    assert model.get_embedding() is model.embed_tokens
    assert model.get_lm_head() is model.lm_head
    model.resize_token_embeddings(35)
    assert_same_logits(logits(model)[..., :32], before)
    assert (model.embed_tokens.num_embeddings, model.lm_head.out_features, model.up.out_features) == (35, 35, 32)
    model.save_pretrained(tmp_path)
    assert_same_arrays(MyModel.from_pretrained(tmp_path).params, model.params)


def test_whatever_depends_on_the_size_follows():
    model = Rounded(rngs=nnx.Rngs(0))
    before = logits(model)
    model.resize_token_embeddings(33)
    assert (model.table.num_embeddings, model.num_tokens, model.head.out_features) == (48, 33, 33)
    assert model.inner.kernel.shape == (8, OLD)
    np.testing.assert_array_equal(model.allowed[...], np.arange(33) % 2)
    assert_same_logits(logits(model)[..., :OLD], before)
    assert model.get_embedding() is model.table
    assert model.get_lm_head() is model.head


class Nested(EasyDeLBaseConfig):
    model_type = "nested"

    def __init__(self, text=None, **kwargs):
        self.text_config = MyModelConfig(vocab_size=OLD) if text is None else text
        super().__init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        return self.text_config


class Outer(EasyDeLBaseModule):
    """A model of several parts: the vocabulary is the nested config's; a table of another kind stands beside it."""

    def __init__(self, config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.language_model = MyModel(config.text_config, dtype, param_dtype, precision, rngs)
        self.patches = nnx.Embed(OLD, 16, rngs=rngs)

    def __call__(self, input_ids):
        return self.language_model(input_ids)


def test_nested_configs():
    config = Nested()
    model = Outer(config, rngs=nnx.Rngs(0)).resize_token_embeddings(NEW)
    assert config.text_config.vocab_size == OLD
    assert model.config.text_config.vocab_size == NEW
    assert model.language_model.config is model.config.text_config
    assert model.get_embedding() is model.language_model.embed_tokens
    assert model.patches.num_embeddings == OLD


class Tied(User):
    def __init__(self, config=None, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.target = nnx.Embed(self.config.vocab_size, self.config.hidden_size, rngs=rngs)
        self.target.embedding = self.table.embedding


def test_layers_that_share_a_table_stay_tied():
    model = Tied(rngs=nnx.Rngs(0)).resize_token_embeddings(NEW)
    assert model.target.embedding is model.table.embedding
    assert model.target.num_embeddings == model.table.num_embeddings == NEW
    assert isinstance(model.get_embedding(), nnx.Embed)


# ---------------------------------------------------------------------- errors
WRONG = {
    "zero": (lambda m: m.resize_token_embeddings(0), ValueError, "new_num_tokens must be a positive integer, got 0"),
    "negative": (lambda m: m.resize_token_embeddings(-3), ValueError, "got -3"),
    "float": (lambda m: m.resize_token_embeddings(30.0), ValueError, r"got 30\.0"),
    "bool": (lambda m: m.resize_token_embeddings(True), ValueError, "got True"),
    "text": (lambda m: m.resize_token_embeddings("30"), ValueError, "got '30'"),
    "multiple": (lambda m: m.resize_token_embeddings(30, 0), ValueError, "pad_to_multiple_of must be a positive"),
    "special": (lambda m: m.resize_token_embeddings(20), ValueError, r"config\.eos_token_id=\[2, 22\], generation_c"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_and_changes_nothing(name):
    model = fresh("llama", False, sharding_axis_dims=(1, 2, 1, 4, 1))
    model.config.eos_token_id = [2, 22]
    model.config.pad_token_id = 1000  # outside already
    model.generation_config = transformers.GenerationConfig(pad_token_id=23)
    verb, error, message = WRONG[name]
    before = snapshot(model)
    with pytest.raises(error, match=message):
        verb(model)
    assert_unchanged(model, before)
    model.resize_token_embeddings(np.int64(25))
    assert model.resize_token_embeddings().config.vocab_size == 25


class WithoutTokens(EasyDeLBaseModule):
    def __init__(self, config, dtype=None, param_dtype=None, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.layer = nnx.Linear(OLD, OLD, rngs=rngs)


class TwoTables(User):
    def __init__(self, config=None, dtype=None, param_dtype=None, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.target = nnx.Embed(self.config.vocab_size, 4, rngs=rngs)
        self.other_head = nnx.Linear(4, self.config.vocab_size, rngs=rngs)


def test_models_whose_parts_are_unclear():
    none, two = WithoutTokens(MyModelConfig(), rngs=nnx.Rngs(0)), TwoTables(rngs=nnx.Rngs(0))
    for call in (none.get_embedding, lambda: none.resize_token_embeddings(40)):
        with pytest.raises(ValueError, match=r"WithoutTokens lacks an nnx.Embed .* defines get_embedding"):
            call()
    assert none.get_lm_head() is None
    with pytest.raises(ValueError, match=r"2 layers .*: ta\w+, ta\w+; define get_embedding in TwoTables"):
        two.get_embedding()
    with pytest.raises(ValueError, match="head, other_head; define get_lm_head"):
        two.get_lm_head()
    with pytest.raises(ValueError, match="has no vocab_size"):
        WithoutTokens(EasyDeLBaseConfig(), rngs=nnx.Rngs(0)).resize_token_embeddings(3)


def test_a_model_that_says_which_is_resized():
    class Chosen(TwoTables):
        def get_embedding(self):
            return self.table

    model = Chosen(rngs=nnx.Rngs(0)).resize_token_embeddings(NEW)
    assert model.target.num_embeddings == model.table.num_embeddings == NEW  # both depend on the config


def test_layers_that_are_not_as_their_class_builds_them():
    model = User(rngs=nnx.Rngs(0))
    model.head.lora = nnx.Param(jnp.zeros((2, OLD)))
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"resizing head is not supported: it holds .*head/lora"):
        model.resize_token_embeddings(NEW)
    assert_unchanged(model, before)
    model = User(rngs=nnx.Rngs(0))
    model.config.vocab_size = OLD - 1
    with pytest.raises(ValueError, match=r"allowed has shape \(24,\), but the config \(vocab_size=23\) means \(23,\)"):
        model.resize_token_embeddings(NEW)


# ---------------------------------------------------------------------- parts
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_parts_of_decoders(family, tied):
    model = fresh(family, tied)
    backbone = getattr(model, model.base_model_prefix)
    assert model.get_embedding() is backbone.get_embedding() is backbone.embed_tokens
    assert model.get_lm_head() is (backbone.embed_tokens if tied else model.lm_head)
    assert backbone.get_lm_head() is None
    assert model.get_decoder() is backbone.get_decoder() is backbone
    with pytest.raises(UnsupportedError, match=f"get_encoder is not supported by {type(model).__name__}: it is a dec"):
        model.get_encoder()


def test_parts_of_classifiers():
    config = easydel.LlamaConfig(**SMALL, num_labels=OLD)  # as many labels as tokens
    model = easydel.LlamaForSequenceClassification(config, rngs=nnx.Rngs(0))
    assert model.get_embedding() is model.model.embed_tokens
    assert model.get_lm_head() is None
    before = logits(model)
    np.testing.assert_array_equal(logits(model.resize_token_embeddings(NEW)), before)  # nothing else has changed


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(OLD, OLD, rngs=rngs)


class Encoding(User):
    """An encoder whose head is called a decoder."""

    can_generate = False
    model_task = TaskType.MASKED_LM

    def __init__(self, config=None, dtype=None, param_dtype=None, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.decoder = self.head
        del self.head
        self.bias = nnx.Param(jnp.zeros((self.config.vocab_size,)))


class Both(User):
    def __init__(self, config=None, dtype=None, param_dtype=None, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.encoder, self.decoder = Stack(rngs), Stack(rngs)


def test_parts_of_encoders_and_of_pairs():
    encoding = Encoding(rngs=nnx.Rngs(0))
    assert encoding.get_encoder() is encoding
    assert encoding.get_lm_head() is encoding.decoder
    with pytest.raises(UnsupportedError, match="get_decoder is not supported by Encoding: it is an encoder only"):
        encoding.get_decoder()
    encoding.resize_token_embeddings(NEW)
    assert encoding.bias.shape == encoding.decoder.bias.shape == (NEW,)
    both = Both(rngs=nnx.Rngs(0))
    assert (both.get_encoder(), both.get_decoder()) == (both.encoder, both.decoder)
    mine = MyModel(MyModelConfig(), rngs=nnx.Rngs(0))
    assert mine.get_decoder() is mine
