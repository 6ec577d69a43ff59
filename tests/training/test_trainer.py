"""The trainer: a run that is stopped, killed or moved ends as one that was not."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from flax import nnx

from easydel import DataConfig, LlamaForCausalLM, LossConfig, TrainingError
from easydel.checkpoints import CheckpointError, Checkpoints
from easydel.errors import ShardingError
from easydel.sharding import create_mesh
from easydel.training import Trainer
from easydel.training.logs import read_log
from tests.training.runs import arguments, batch_of, numbers, tiny_llama, trainer


class Killed(Exception):
    """Stands for the end of a process: nothing after it runs."""


def killed_at(step):
    def callback(run, record):
        if record["step"] == step:
            raise Killed

    return callback


def stopped_at(step):
    return lambda run, record: record["step"] == step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trainer(folder).train()


def test_learns_and_says_so(whole):
    folder, result = whole
    assert (result.reason, result.progress.iteration, result.progress.tokens) == ("max_steps", 8, 8 * 8 * 12)
    assert result.progress.skipped == 0
    records = read_log(folder / "log.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    rates = [record["learning_rate"] for record in records]
    assert rates[:3] == [0.0, pytest.approx(5e-3), pytest.approx(1e-2)]
    assert rates[-1] < rates[-2] < rates[3]
    assert {"grad_norm", "tokens_per_second", "mfu", "memory_bytes", "skipped_steps"} <= records[0].keys()


# Before the first checkpoint, and after it; right after the last one.
@pytest.mark.parametrize(
    "steps", [(1, 4), pytest.param((4,), marks=pytest.mark.slow), pytest.param((7,), marks=pytest.mark.slow)]
)
def test_a_killed_run_ends_as_the_whole_one(whole, tmp_path, steps):
    for step in steps:
        with pytest.raises(Killed):
            trainer(tmp_path, callbacks=[killed_at(step)]).train()
    seen = []

    def spied(index):
        seen.append(index)
        return batch_of(index)

    result = trainer(tmp_path, data=spied).train()
    assert numbers(result.state) == numbers(whole[1].state)
    assert seen == list(range(steps[-1] // 3 * 3, 8))  # from the last checkpoint on, each once
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 9))
    losses = [[record["loss"] for record in read_log(folder / "log.jsonl")] for folder in (tmp_path, whole[0])]
    assert losses[0] == losses[1]


# test_train.py of the command sends both.
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_the_run(whole, tmp_path, number):
    def send(run, record):
        if record["step"] == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = trainer(tmp_path, callbacks=[send], save_steps=None).train()
    assert signal.getsignal(number) is before
    assert result.reason == number.name
    assert result.progress.iteration in (5, 6)  # Python handles it between two instructions
    again = trainer(tmp_path, save_steps=None).train()
    assert numbers(again.state) == numbers(whole[1].state)


@pytest.mark.slow  # ../distributed/test_kills.py goes on on other meshes
def test_resumed_on_another_mesh_as_one_that_changed_there(tmp_path):
    def sharded(dims):
        return tiny_llama().shard_model(mesh=create_mesh(dims))

    first, second = (1, 8, 1, 1, 1), (2, 2, 1, 2, 1)
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", sharded(first), callbacks=[killed_at(5)]).train()
    killed = trainer(tmp_path / "killed", sharded(second)).train()
    trainer(tmp_path / "changed", sharded(first), callbacks=[stopped_at(3)]).train()
    changed = trainer(tmp_path / "changed", sharded(second)).train()
    assert numbers(killed.state) == numbers(changed.state)
    assert killed.model.mesh.shape["tp"] == 2


@pytest.mark.slow  # so do those of the run of chats in test_elarge.py
def test_frozen_parameters_and_accumulation_resume_too(tmp_path):
    fields = {"frozen": "embed_tokens", "gradient_accumulation_steps": 4}
    whole = trainer(tmp_path / "whole", **fields).train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", callbacks=[killed_at(4)], **fields).train()
    assert numbers(trainer(tmp_path / "killed", **fields).train().state) == numbers(whole.state)
    embedding = whole.model.params["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(embedding, tiny_llama().params["model"]["embed_tokens"]["embedding"])


def test_plain_iterables_are_run_through_again(whole, tmp_path):
    batches = [batch_of(index) for index in range(8)]
    trainer(tmp_path, data=batches, callbacks=[stopped_at(4)]).train()
    result = trainer(tmp_path, data=batches).train()
    assert numbers(result.state) == numbers(whole[1].state)
    short = trainer(tmp_path / "short", data=batches[:5]).train()
    assert (short.reason, short.progress.iteration) == ("data", 5)


class TestNotFinite:
    @staticmethod
    def poisoned(*steps):
        def data(index):
            batch = batch_of(index)
            embeds = np.ones((8, 12, 16), np.float32)
            return {"labels": batch["labels"], "inputs_embeds": embeds * (np.nan if index in steps else 1)}

        return data

    def test_a_step_is_skipped_and_counted(self, tmp_path):
        result = trainer(tmp_path, data=self.poisoned(2, 5)).train()
        assert (result.progress.skipped, result.progress.skipped_in_a_row) == (2, 0)
        assert int(result.state.step) == 6
        assert read_log(tmp_path / "log.jsonl")[-1]["skipped_steps"] == 2

    def test_too_many_in_a_row_stop_the_run_with_the_last_good_state(self, tmp_path):
        run = trainer(tmp_path, data=self.poisoned(4, 5, 6, 7), max_skipped_steps=3, save_steps=None)
        with pytest.raises(TrainingError, match=r"3 steps in a row had no finite loss.*saved in"):
            run.train()
        good = trainer(tmp_path / "good", data=self.poisoned(), callbacks=[stopped_at(4)], save_steps=None).train()
        assert numbers(run.state) == numbers(good.state)
        with Checkpoints(tmp_path / "checkpoints") as kept:
            assert len(kept.steps) == 1
        again = trainer(tmp_path, data=self.poisoned(), save_steps=None).train()
        assert again.progress.iteration == 8


class TestEvaluation:
    EVAL = (batch_of(100), batch_of(101))

    def test_is_a_mean_over_all_targets_and_keeps_the_best(self, tmp_path):
        run = trainer(tmp_path, eval_data=self.EVAL, eval_steps=2, save_steps=None, save_total_limit=1)
        result = run.train()
        model = result.model
        compute = nnx.jit(lambda model, batch: model.compute_loss(**batch)[1])
        told = [compute(model, batch) for batch in self.EVAL]
        counts = [int(t["num_tokens"]) for t in told]
        expected = sum(float(t["loss"]) * n for t, n in zip(told, counts, strict=True)) / sum(counts)
        assert result.metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert result.metrics["eval_perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
        assert result.metrics["eval_tokens"] == sum(counts)
        evaluations = {r["step"]: r["eval_loss"] for r in read_log(tmp_path / "log.jsonl") if "eval_loss" in r}
        assert list(evaluations) == [2, 4, 6, 8]
        with Checkpoints(tmp_path / "checkpoints", best_metric="eval_loss") as kept:
            assert kept.best_step == min(evaluations, key=evaluations.get)

    def test_stops_early_and_ends_with_the_best(self, tmp_path):
        run = trainer(
            tmp_path, eval_data=self.EVAL, eval_steps=1, save_steps=None, early_stopping_patience=2,
            load_best_model_at_end=True, learning_rate=1.0, optimizer="sgd", weight_decay=0.0, max_steps=30,
            schedule="constant", max_grad_norm=None, warmup_steps=0, momentum=0.9,
        )  # fmt: skip
        result = run.train()
        losses = [r["eval_loss"] for r in read_log(tmp_path / "log.jsonl") if "eval_loss" in r]
        assert result.reason == "early_stopping"
        assert len(losses) < 30
        assert min(losses[:-2]) == min(losses)
        assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)

    def test_stopped_early_it_stays_so(self, tmp_path):
        fields = dict(
            eval_data=self.EVAL,
            eval_steps=1,
            early_stopping_patience=2,
            early_stopping_threshold=100.0,
            save_steps=None,
        )
        first = trainer(tmp_path, **fields).train()
        assert (first.reason, first.progress.iteration) == ("early_stopping", 3)  # nothing is better by so much
        again = trainer(tmp_path, **fields).train()
        assert (again.reason, again.progress.iteration) == ("early_stopping", 3)
        assert again.metrics == first.metrics

    def test_the_end_is_measured_even_right_after_another_evaluation(self, tmp_path):
        result = trainer(tmp_path, eval_data=self.EVAL, eval_steps=3, log_steps=50).train()
        assert result.metrics["step"] == 8
        records = [(r["step"], "loss" in r) for r in read_log(tmp_path / "log.jsonl")]
        assert records == [(3, False), (6, False), (8, True), (8, False)]

    def test_a_sum_is_learned_but_a_mean_is_told(self, tmp_path):
        losses = []
        for reduction in ("mean", "sum"):
            config = LossConfig(reduction=reduction)
            run = trainer(tmp_path / reduction, eval_data=self.EVAL, eval_steps=1, loss_config=config)
            losses.append(run.evaluate()["eval_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_without_data_or_the_metric_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no eval_data"):
            trainer(tmp_path).evaluate()
        with pytest.raises(ValueError, match=r"best_metric='bleu' is none of the evaluation's: .*eval_loss"):
            trainer(tmp_path, eval_data=self.EVAL, eval_steps=1, best_metric="bleu").train()


class TestFieldsHaveAnEffect:
    """Those that no other test of this file changes."""

    @staticmethod
    def run(folder, **fields):
        usual = dict(max_steps=2, warmup_steps=0, save_steps=None)
        return trainer(folder, **usual | fields).train()

    @pytest.mark.parametrize(
        "fields",
        [
            {"seed": 1},
            {"loss_config": LossConfig(z_loss_coefficient=0.1)},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_on_what_is_learned(self, whole, tmp_path, fields):
        assert numbers(trainer(tmp_path, **fields).train().state) != numbers(whole[1].state)

    def test_on_what_is_trained(self, tmp_path):
        result = self.run(tmp_path, trainable="lm_head")
        before, after = tiny_llama().params, result.state.params
        np.testing.assert_array_equal(before["model"]["norm"]["scale"], after["model"]["norm"]["scale"])
        assert (before["lm_head"]["kernel"] != after["lm_head"]["kernel"]).any()

    def test_on_what_is_kept(self, tmp_path):
        fields = dict(eval_data=(batch_of(100),), max_steps=4, eval_steps=1, save_steps=1, save_total_limit=1)
        fields |= dict(best_metric="eval_loss", lowest_is_best=False, learning_rate=0.1, schedule="constant")
        self.run(tmp_path, **fields)
        losses = {r["step"]: r["eval_loss"] for r in read_log(tmp_path / "log.jsonl") if "eval_loss" in r}
        worst = max(losses, key=losses.get)
        with Checkpoints(tmp_path / "checkpoints", best_metric="eval_loss", lowest_is_best=False) as kept:
            assert kept.best_step == worst
            assert kept.steps == sorted({worst, 4})

    def test_on_how_much_is_evaluated_at_once(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("x = 1\n" * 40)
        data = DataConfig(str(tmp_path / "a.txt"), sequence_length=12)
        model = tiny_llama(vocab_size=4096)
        shapes = set()
        forward = type(model).compute_loss

        class Spied(type(model)):
            def compute_loss(self, *, labels, **inputs):
                shapes.add(labels.shape)
                return forward(self, labels=labels, **inputs)

        made = arguments(tmp_path, eval_batch_size=3)
        Trainer(Spied(model.config, rngs=nnx.Rngs(0)), made, data, data, tokenizer=tokenizer).evaluate()
        assert shapes == {(3, 12)}


class TestRefusals:
    def test_an_earlier_run_is_neither_mixed_nor_lost(self, tmp_path):
        trainer(tmp_path, callbacks=[stopped_at(3)]).train()
        with pytest.raises(TrainingError, match="earlier run"):
            trainer(tmp_path, resume=False).train()
        with pytest.raises(CheckpointError, match="something else"):
            trainer(tmp_path, optimizer="sgd", weight_decay=0.0).train()
        with pytest.raises(CheckpointError, match="expected float32"):
            trainer(tmp_path, tiny_llama(hidden_size=32)).train()
        assert trainer(tmp_path).train().progress.iteration == 8

    def test_data_that_cannot_be_trained_on(self, tmp_path):
        with pytest.raises(TypeError, match="training data must be"):
            trainer(tmp_path, data=3)
        with pytest.raises(TrainingError, match="no batch"):
            trainer(tmp_path, data=[]).train()
        with pytest.raises(ValueError, match=r"token ids must lie in \[0, 32\)"):
            trainer(tmp_path, data=lambda i: {k: v + 40 for k, v in batch_of(i).items()}).train()
        with pytest.raises(TypeError, match="takes no 'input_idz'"):
            trainer(
                tmp_path, data=lambda i: {"input_idz": batch_of(i)["labels"], "labels": batch_of(i)["labels"]}
            ).train()
        with pytest.raises(ShardingError, match="6 rows cannot be split over 8 devices"):
            trainer(
                tmp_path, tiny_llama().shard_model(mesh=create_mesh((1, 8, 1, 1, 1))),
                data=lambda i: {k: v[:6] for k, v in batch_of(i).items()},
            ).train()  # fmt: skip


@pytest.mark.slow  # as in test_elarge.py
def test_the_finished_model_is_saved(tmp_path):
    result = trainer(tmp_path, save_model=True, max_steps=2, warmup_steps=0).train()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(loaded.params["lm_head"]["kernel"], result.model.params["lm_head"]["kernel"])


def test_all_logs(tmp_path):
    Trainer(tiny_llama(), arguments(tmp_path, log_to=None, max_steps=3), batch_of, (batch_of(9),)).train()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").iterdir())
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 4
