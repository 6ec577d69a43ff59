"""`eLargeModel`: what a mapping may say, and whole runs that it describes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easydel import LlamaForCausalLM, UnsupportedError, eLargeModel
from easydel.checkpoints import Checkpoints
from easydel.errors import ShardingError
from easydel.training.logs import read_log
from tests.training.runs import bits

LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4096,
    "num_key_value_heads": 2,
}  # fmt: skip
FRESH = {"model_type": "llama", "tokenizer": "stdlib-4m", "config": LLAMA}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def described(**sections):
    return {"model": {"name_or_path": "stdlib-4m"}, "training": {"output_dir": "out"}} | sections


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainig": {}}, "the configuration has no field 'trainig'; did you mean 'training'"),
        ({"modle": {}, "dta": {}}, r"no field 'modle'; did you mean 'model'\?\n.*no field 'dta'; did you mean 'data'"),
        ({"optimizer": "adamw"}, "optimizer: expected a mapping, got 'adamw'"),
        ({"model": {"name_or_pth": "x"}}, "model has no field 'name_or_pth'; did you mean 'name_or_path'"),
        ({"model": {}}, "give name_or_path .* or model_type"),
        ({"model": {"name_or_path": "x", "model_type": "llama"}}, "not both"),
        ({"model": {"name_or_path": "x", "config": 3}}, "model.config: expected a mapping, got 3"),
        ({"model": {"name_or_path": "x", "dtype": "float8"}}, r"model.dtype='float8' is not supported; choose one of"),
        ({"model": {"model_type": "llama", "revision": "v1"}}, "model.revision is of a model that is loaded"),
        (
            {"training": {"output_dir": "o", "max_stps": 1}},
            "training has no field 'max_stps'; did you mean 'max_steps'",
        ),
        (
            {"training": {"output_dir": "o", "max_steps": "many"}},
            "training.max_steps: expected int or null, got 'many'",
        ),
        ({"training": {}}, "training.output_dir: name a folder"),
        ({"optimizer": {"lr": 1}}, "optimizer has no field 'lr'"),
        ({"optimizer": {"beta1": "x"}}, "optimizer.beta1: expected float, got 'x'"),
        ({"schedule": {"warmup": 1}}, "schedule has no field 'warmup'; did you mean 'warmup_"),
        ({"logging": {"to": "console"}}, "logging.to: expected a list or null, got 'console'"),
        ({"loss": {"z_los": 1}}, "loss has no field 'z_los'; did you mean 'z_loss_coefficient'"),
        ({"data": {"trian": "a.txt"}}, "data has no field 'trian'; did you mean 'train'"),
        ({"data": {"train": {"pth": "a"}}}, "data.train has no field 'pth'; did you mean 'path'"),
        ({"data": {"train": 3}}, "data.train: expected a mapping, a file or a list of files, got 3"),
        ({"data": {"eval": {"path": "a", "sequence_length": 1}}}, "data.eval: sequence_length must be at least 2"),
        ({"mesh": {"pp": 2}}, "mesh has no field 'pp'"),
        ({"mesh": {"tp": "2"}}, "mesh.tp: expected a number of devices"),
        ({"lora": {"rank": "x"}}, "lora.rank: expected int, got 'x'"),
        ({"quantization": {"methd": "nf4"}}, "quantization has no field 'methd'; did you mean 'method'"),
        (
            {"loss": {}, "training": {"output_dir": "o", "loss_config": {}}},
            "loss and training.loss_config say the same",
        ),
        (
            {"optimizer": {"name": "sgd"}, "training": {"output_dir": "o", "optimizer": "lion"}},
            "optimizer and training.optimizer say the same",
        ),
        ({"mesh": {"pp": 2}, "data": {"trian": 1}, "model": {}}, r"(?s)model: give.*data has no.*mesh has no"),
    ],
)
def test_what_is_unknown_or_wrong_is_named(sections, message):
    with pytest.raises(ValueError, match=message):
        eLargeModel(described(**sections))


def test_each_section_reaches_its_settings():
    made = eLargeModel(
        described(
            optimizer={"name": "lion", "learning_rate": "1e-4", "beta2": 0.99, "max_grad_norm": None},
            schedule={"name": "wsd", "warmup_steps": 3, "decay_ratio": 0.5},
            logging={"to": ["jsonl"], "steps": 7},
            loss={"z_loss_coefficient": 1e-4},
            data={"sequence_length": 32, "train": ["a.txt", "b.txt"], "eval": {"path": "c.txt", "packing": False}},
            mesh={"tp": 2, "fsdp": -1},
            lora=None,
            quantization=None,
        )
    )
    arguments = made.arguments
    assert (arguments.optimizer, arguments.learning_rate, arguments.adam_beta2) == ("lion", 1e-4, 0.99)
    assert (arguments.max_grad_norm, arguments.schedule, arguments.warmup_steps) == (None, "wsd", 3)
    assert (arguments.decay_ratio, arguments.log_to, arguments.log_steps) == (0.5, ("jsonl",), 7)
    assert arguments.loss_config.z_loss_coefficient == 1e-4
    assert (made.train_data.path, made.train_data.sequence_length, made.train_data.packing) == (
        ("a.txt", "b.txt"),
        32,
        True,
    )
    assert (made.eval_data.path, made.eval_data.sequence_length, made.eval_data.packing) == ("c.txt", 32, False)
    assert dict(made.build_mesh().shape) == {"dp": 1, "fsdp": 4, "ep": 1, "tp": 2, "sp": 1}


def test_a_file_and_what_is_set_beside_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {name_or_path: stdlib-4m}\ntraining: {output_dir: out}\noptimizer: {learning_rate: 1e-4}\ndata:\n"
    )
    made = eLargeModel.from_yaml(file, {"training.max_steps": 5, "data.train.path": "x.txt", "logging.to": []})
    assert (made.arguments.learning_rate, made.arguments.max_steps, made.arguments.log_to) == (1e-4, 5, ())
    assert made.train_data.path == "x.txt"
    with pytest.raises(ValueError, match=r"model\.name_or_path\.x: name_or_path is no section but 'stdlib-4m'"):
        eLargeModel.from_yaml(file, {"model.name_or_path.x": 1})
    file.write_text("- a\n")
    with pytest.raises(ValueError, match=r"run\.yaml: expected a mapping of sections \(model, quantization, "):
        eLargeModel.from_yaml(file)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (FRESH | {"config": {"hiden_size": 8}}, ValueError, "model.config: LlamaConfig has no field 'hiden_size'"),
        (FRESH | {"config": {"hidden_size": "big"}}, ValueError, r"(?s)model\.config: .*hidden_size"),
        (FRESH | {"config": {"dtype": "bfloat16"}}, ValueError, "model.config: dtype is no field"),
        (FRESH | {"model_type": "lama"}, UnsupportedError, "lama"),
        (FRESH | {"task": "speech-seq2seq"}, UnsupportedError, "speech-seq2seq"),
        (
            {"name_or_path": "stdlib-4m", "config": {"hiden_size": 8}},
            ValueError,
            "LlamaConfig has no field 'hiden_size'",
        ),
        ({"name_or_path": "no/such/folder"}, ValueError, "no/such/folder"),
    ],
)
def test_models_that_cannot_be_built(model, error, message):
    with pytest.raises(error, match=message):
        eLargeModel(described(model=model)).build_model()


def test_what_a_run_needs_is_asked_for_before_it_begins(tmp_path):
    (tmp_path / "a.txt").write_text("x = 1\n" * 50)
    with pytest.raises(ValueError, match=r"data\.train: name the data to train on"):
        eLargeModel(described()).build_trainer()
    nameless = {"model_type": "llama", "config": LLAMA}
    with pytest.raises(ValueError, match="a fresh model has no tokenizer of its own"):
        eLargeModel(described(model=nameless, data={"train": "a.txt"})).build_trainer()
    data = {"train": {"path": str(tmp_path / "a.txt"), "sequence_length": 16}}
    with pytest.raises(ShardingError, match="6 rows cannot be split over 8 devices"):
        eLargeModel(
            described(model=FRESH, data=data, training={"output_dir": "o", "batch_size": 6, "max_steps": 1})
        ).build_trainer()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    import json

    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    turns = [
        [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": f"it is {n + 1}."}]
        for n in range(64)
    ]
    file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return file


def chat_run(folder, chats):
    """Everything at once: a fresh model on a mesh, bfloat16, chats, a frozen table, accumulation, evaluation."""
    return eLargeModel(
        {
            "model": FRESH | {"dtype": "bfloat16"},
            "mesh": {"fsdp": 4, "tp": 2},
            "data": {"sequence_length": 32, "chat_template": TEMPLATE, "train": str(chats), "eval": str(chats)},
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.01},
            "training": {
                "output_dir": str(folder),
                "max_steps": 6,
                "batch_size": 8,
                "gradient_accumulation_steps": 2,
                "frozen": "embed_tokens",
                "save_steps": 3,
                "eval_steps": 3,
            },
            "logging": {"to": ["jsonl"], "steps": 4},
        }
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chats):
    folder = tmp_path_factory.mktemp("whole")
    return folder, chat_run(folder, chats).train()


class TestChatRun:
    def test_only_the_assistant_is_learned(self, tmp_path, chats, tokenizer):
        trainer = chat_run(tmp_path, chats).build_trainer()
        batch = next(trainer._source)
        labels = batch["labels"][batch["labels"] != -100]
        text = tokenizer.decode(labels)
        assert "it is" in text
        assert "user" not in text
        assert "+ 1" not in text

    def test_parameters_and_moments_stay_float32(self, whole):
        state = whole[1].state
        kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))}
        assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}  # int32: counts
        assert state.model(jnp.ones((1, 4), jnp.int32)).logits.dtype == jnp.bfloat16

    def test_lies_on_the_mesh_it_names(self, whole):
        model = whole[1].model
        assert dict(model.mesh.shape) == {"dp": 1, "fsdp": 4, "ep": 1, "tp": 2, "sp": 1}
        kernel = model.params["model"]["layers"]["0"]["mlp"]["up_proj"]["kernel"]
        assert kernel.sharding.num_devices == 8
        assert kernel.addressable_shards[0].data.size == kernel.size // 8

    def test_what_is_frozen_stays_and_the_rest_moves(self, whole, chats, tmp_path):
        before = chat_run(tmp_path, chats).build_model().params
        after = whole[1].state.params
        assert bits(before["model"]["embed_tokens"]) == bits(after["model"]["embed_tokens"])
        assert bits(before["lm_head"]) != bits(after["lm_head"])

    def test_the_last_steps_are_logged_and_the_last_evaluation_is_of_the_end(self, whole):
        folder, result = whole
        records = [(r["step"], sorted(r.keys() & {"loss", "eval_loss"})) for r in read_log(folder / "log.jsonl")]
        assert records == [(3, ["eval_loss"]), (4, ["loss"]), (6, ["eval_loss"]), (6, ["loss"])]
        assert result.metrics["step"] == 6
        assert result.metrics["eval_loss"] == read_log(folder / "log.jsonl")[2]["eval_loss"]

    def test_a_finished_model_is_left_behind(self, whole, tokenizer):
        folder, result = whole
        loaded = LlamaForCausalLM.from_pretrained(folder / "model")
        np.testing.assert_array_equal(loaded.params["lm_head"]["kernel"], result.state.params["lm_head"]["kernel"])
        assert (folder / "model" / "tokenizer.json").exists()
        with Checkpoints(folder / "checkpoints") as kept:
            assert kept.steps == [3, 6]

    def test_stopped_and_run_again_it_ends_alike_and_then_is_done(self, whole, tmp_path, chats):
        stopped = chat_run(tmp_path, chats).train(callbacks=[lambda run, record: record["step"] == 4])
        assert (stopped.reason, stopped.progress.iteration) == ("callback", 4)
        assert not (tmp_path / "model").exists()
        ended = chat_run(tmp_path, chats).train()
        assert bits(ended.state.params) == bits(whole[1].state.params)
        log = read_log(tmp_path / "log.jsonl")

        said = []
        run = chat_run(tmp_path, chats).build_trainer()
        run.logs.say = said.append
        again = run.train()
        assert said[-1] == "nothing left to do: this run has ended already, at step 6 (max_steps)"
        assert (again.progress.iteration, again.metrics) == (6, ended.metrics)
        assert bits(again.state.params) == bits(ended.state.params)
        assert read_log(tmp_path / "log.jsonl") == log  # nothing is told twice


@pytest.fixture
def text_run(tmp_path):
    """All defaults but the size: no mesh section, so all eight devices."""
    (tmp_path / "a.txt").write_text("".join(f"def answer_{n}():\n    return {n}\n" for n in range(60)))

    def make(name="out", **training):
        return eLargeModel(
            described(
                model=FRESH,
                data={"train": {"path": str(tmp_path / "*.txt"), "sequence_length": 32}},
                optimizer={"learning_rate": 1e-2},
                training={"output_dir": str(tmp_path / name), "batch_size": 8, "save_model": False} | training,
                logging={"to": ["jsonl"], "steps": 2},
            )
        )

    return make


@pytest.mark.slow  # data that begin again: test_data_rows.py; all devices: test_train.py of the command
def test_steps_go_through_the_data_as_often_as_they_need(text_run, tmp_path):
    result = text_run("steps", max_steps=12).train()
    assert (result.reason, result.progress.iteration) == ("max_steps", 12)
    assert dict(result.model.mesh.shape)["fsdp"] == 8
    losses = [record["loss"] for record in read_log(tmp_path / "steps" / "log.jsonl")]
    assert losses[-1] < losses[0] - 0.5


def test_epochs_end_where_the_data_do(text_run):
    once, twice = (text_run(f"epochs{n}", num_train_epochs=n).build_trainer() for n in (1, 2))
    assert 2 * once.total_steps <= twice.total_steps <= 2 * once.total_steps + 1  # rows left over are not lost
    result = once.train()
    assert (result.reason, result.progress.iteration) == ("max_steps", once.total_steps)
    assert next(once._source, None) is None
