"""What is saved by several processes in other ways, what one does for all, and what happens if one of them fails."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.distributed.launch import run
from tests.distributed.models import batch_of, make_checkpoint, model_class


def corners(source: str, folder: str) -> dict[str, Any]:
    """Do all of it, each part in a folder of its own."""
    found: dict[str, Any] = {"gathered": arrays_are_gathered()}
    found |= one_does_for_all()
    cls, root = model_class("llama"), Path(folder)
    model = cls.from_pretrained(source, auto_shard_model=True)
    found |= saving_fails(model, root)
    os.chdir(root / f"disk-{jax.process_index()}")  # each process has its own
    model.save_pretrained("model", max_shard_size="300KB")
    os.chdir(root)
    found["adapters"] = adapters(model, root)
    stacked = cls.from_pretrained(source, auto_shard_model=True, scan_layers=True)
    stacked.save_pretrained(root / "stacked")
    codes = cls.from_pretrained(source, auto_shard_model=True, quantization_method="8bit")
    codes.save_pretrained(root / "codes")
    again = cls.from_pretrained(root / "codes", auto_shard_model=True)
    ids = batch_of(0)["input_ids"]
    found["codes"] = [np.asarray(each.generate(ids[:, :6], max_new_tokens=4).sequences) for each in (codes, again)]
    dropout = cls.from_pretrained(source, auto_shard_model=True, attention_dropout=0.1)
    found["other seeds"] = error_of(lambda: cls(model.config, rngs=nnx.Rngs(jax.process_index())).shard_model())
    found["dropout"] = [logits_of(each, ids) for each in (dropout, model)]
    found["torch"] = {name: tensor.numpy() for name, tensor in model.to_torch().items()}
    found["cache"] = cache(model, ids, root)
    return found


def arrays_are_gathered() -> bool:
    """Arrays split in all ways, on a mesh whose processes are no runs of rows, and one piece at a time."""
    from easydel.distributed import gather, whole
    from easydel.sharding import create_mesh

    gather.PIECE = 256
    mesh = create_mesh((2, 2, 1, 2, 1), dcn_axis_dims=(1, 2, 1, 1, 1))
    numbers = np.arange(16 * 12 * 8, dtype=np.float32).reshape(16, 12, 8)
    for spec in (("dp", None, "tp"), (("fsdp", "dp"), "tp"), (None, ("tp", "fsdp")), (None, None, "fsdp"), ()):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        array = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
        if not np.array_equal(whole(array), numbers):
            return False
    gather.PIECE = 64 * 2**20
    return True


def one_does_for_all() -> dict[str, Any]:
    """Return what each process is told by the others."""
    from easydel.distributed import broadcast, by_first, from_all, together, warn

    number = jax.process_index()
    found: dict[str, Any] = {"numbers": from_all(10 * number), "long": broadcast("x" * (5000 + number))}
    found["second's"] = broadcast(f"of {number}", source=1)
    found["first's"] = by_first(lambda: {"number": number})
    found["together"] = together(lambda: number)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn("something")
    found["warnings"] = [(str(one.message), Path(one.filename).name) for one in seen]

    def fails() -> None:
        if number == 1:
            raise ValueError("process 1 cannot")

    def fails_at_first() -> None:
        raise FileExistsError("it is there")

    found["errors"] = [error_of(lambda: together(fails)), error_of(lambda: by_first(fails_at_first))]
    return found


def saving_fails(model: Any, root: Path) -> dict[str, Any]:
    """Save where there is a file, and with a process whose disk is full; all must hear of it, and nothing be left."""
    from easydel.hub import save

    write, found = save._write_shard, {}
    found["a file"] = error_of(lambda: model.save_pretrained(root / "file"))

    def full(file: Path, content: Any) -> None:
        if jax.process_index() == 1:
            next(content)
            raise OSError(errno.ENOSPC, "full")
        write(file, content)

    save._write_shard = full
    found["full"] = error_of(lambda: model.save_pretrained(root / "full", max_shard_size="300KB"))
    save._write_shard = write
    return found


def error_of(work: Any) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def adapters(model: Any, root: Path) -> dict[str, Any]:
    """Train adapters for a step, save them in both ways, load them again."""
    import optax

    from easydel import EasyDeLState
    from easydel.training import TrainStep
    from easydel.training.sources import place_batch

    cls = type(model)
    adapted = cls.from_pretrained(model.config.source_directory, auto_shard_model=True)
    adapted.apply_lora_to_layers(lora_rank=4, lora_pattern=".*q_proj.*")
    step = TrainStep(adapted.to_state(optax.adam(0.1)))
    step(place_batch(batch_of(1), model.mesh))
    trained = step.state.model
    trained.save_adapter(root / "adapter")
    step.state.save_state(root / "adapter-state")
    loaded = cls.from_pretrained(model.config.source_directory, auto_shard_model=True).load_adapter(root / "adapter")
    state = EasyDeLState.load_state(root / "adapter-state", optax.adam(0.1), model=model)
    ids = batch_of(0)["input_ids"]
    return {name: logits_of(each, ids) for name, each in (("own", trained), ("files", loaded), ("state", state.model))}


def cache(model: Any, ids: np.ndarray, root: Path) -> bool:
    """Save a cache whose rows are split over the processes, and read it on one device."""
    from easydel.caching.files import load_cache, save_cache
    from easydel.distributed import whole

    held = jax.jit(lambda params: model.pure_transform_fn()(params, {"input_ids": ids, "cache": empty(model)}).cache)
    made = held(model.params)
    save_cache(made, root / "cache")
    pairs = zip(jax.tree.leaves(made), jax.tree.leaves(load_cache(root / "cache")), strict=True)
    return all(np.array_equal(whole(one), np.asarray(other)) for one, other in pairs)


def empty(model: Any) -> Any:
    return model.init_operations_cache(8, 32)


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    from easydel.distributed import whole

    return whole(jax.jit(model.pure_transform_fn())(model.params, {"input_ids": ids}).logits)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return the folder and what each of two processes found."""
    folder = tmp_path_factory.mktemp("corners")
    (folder / "file").touch()
    for number in range(2):
        (folder / f"disk-{number}").mkdir()
    make_checkpoint("llama", folder / "source")
    return folder, run(corners, 2, 4, str(folder / "source"), str(folder))


def test_one_does_for_all(results: Any) -> None:
    for number, found in enumerate(results[1]):
        assert found["gathered"]
        assert found["numbers"] == [0, 10]
        assert found["long"] == "x" * 5000
        assert found["second's"] == "of 1"
        assert found["first's"] == {"number": 0}
        assert found["together"] == number
        assert found["errors"] == ["ValueError: process 1 cannot", "FileExistsError: it is there"]
    assert [found["warnings"] for found in results[1]] == [[("something", "test_corners.py")], []]


def test_what_fails_in_one_fails_in_all(results: Any) -> None:
    folder, found = results
    for one in found:
        assert one["a file"].startswith("CheckpointError: ")
        assert "is a file" in one["a file"]
        assert "the disk is full; nothing was changed" in one["full"]
        assert "differs between the processes" in one["other seeds"]
    assert not (folder / "full").exists()


def test_process_0_writes_all_where_the_others_have_other_disks(results: Any) -> None:
    folder, _ = results
    assert not list((folder / "disk-1").iterdir())
    assert len(list((folder / "disk-0" / "model").glob("model-*.safetensors"))) > 2
    check_same(folder, folder / "disk-0" / "model")


def test_stacked_layers_are_saved(results: Any) -> None:
    check_same(results[0], results[0] / "stacked")


def check_same(folder: Path, saved: Path) -> None:
    pairs = (model_class("llama").from_pretrained(each).params for each in (folder / "source", saved))
    jax.tree.map(np.testing.assert_array_equal, *pairs)


def test_adapters_and_codes_come_back(results: Any) -> None:
    folder, found = results
    alone = model_class("llama").from_pretrained(folder / "source").load_adapter(folder / "adapter")
    logits = np.asarray(alone(batch_of(0)["input_ids"]).logits)
    for one in found:
        for name in ("own", "files", "state"):  # sums in another order
            np.testing.assert_allclose(one["adapters"][name], logits, atol=1e-4)
        np.testing.assert_array_equal(*one["codes"])
        np.testing.assert_allclose(*one["dropout"], atol=1e-4)  # it is off
        assert one["cache"]


def test_torch_gets_all(results: Any) -> None:
    folder, found = results
    alone = model_class("llama").from_pretrained(folder / "source").to_torch()
    for one in found:
        assert one["torch"].keys() == alone.keys()
        for name, tensor in alone.items():
            np.testing.assert_array_equal(one["torch"][name], tensor.numpy())
