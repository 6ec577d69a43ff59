"""Checkpoints of named arrays: what is kept, what is refused, what a broken one does."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from easydel.checkpoints import CheckpointError, Checkpoints, load_arrays, save_arrays
from easydel.sharding import create_mesh

ARRAYS = {"params/a/kernel": jnp.arange(32.0).reshape(8, 4), "params/layers/0:2:1/b": jnp.ones(3, jnp.bfloat16),
          "step": jnp.int32(7)}  # fmt: skip


def at(step: int) -> dict[str, jax.Array]:
    return {name: array + step for name, array in ARRAYS.items()}


def test_one_checkpoint_comes_back_on_another_mesh(tmp_path):
    save_arrays(tmp_path / "one", ARRAYS, {"rows": [1, {"x": None}]})
    mesh = create_mesh((1, 4, 1, 2, 1))
    split = NamedSharding(mesh, P("fsdp", "tp"))
    like = dict(ARRAYS) | {"params/a/kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)}
    arrays, metadata = load_arrays(tmp_path / "one", like)
    assert metadata == {"rows": [1, {"x": None}]}
    assert arrays["params/a/kernel"].sharding == split
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(arrays[name]), np.asarray(array))
    with pytest.raises(FileExistsError, match="exists already"):
        save_arrays(tmp_path / "one", ARRAYS, {})
    save_arrays(tmp_path / "one", at(1), {}, overwrite=True)
    assert int(load_arrays(tmp_path / "one", ARRAYS)[0]["step"]) == 8


def test_arrays_of_something_else_are_refused_by_name(tmp_path):
    save_arrays(tmp_path / "one", ARRAYS, {})
    other = {"params/a/kernel": jnp.zeros((8, 5)), "params/c": jnp.zeros(2), "step": jnp.float32(0)}
    with pytest.raises(CheckpointError) as caught:
        load_arrays(tmp_path / "one", other)
    for part in (
        "params/a/kernel: expected float32[8, 5], got float32[8, 4]", "params/c: missing",
        "params/layers/0:2:1/b: not expected", "step: expected float32[], got int32[]",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_arrays(tmp_path / "two", ARRAYS)
    (tmp_path / "three").mkdir()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_arrays(tmp_path / "three", ARRAYS)


@pytest.mark.parametrize(
    ("lowest", "losses", "kept", "best"),
    [
        (True, (5, 1, 3, 4), [2, 3, 4], 2),
        (False, (5, 1, 3, 4), [1, 3, 4], 1),
        (True, (float("nan"), 2, 1, 3), [3, 4], 3),
    ],
)  # fmt: skip
def test_the_last_and_the_best_are_kept(tmp_path, lowest, losses, kept, best):
    with Checkpoints(tmp_path, keep=2, best_metric="loss", lowest_is_best=lowest) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, at(step), {"step": step}, {"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps == kept
        assert checkpoints.best_step == best
    with Checkpoints(tmp_path, keep=2, best_metric="loss", lowest_is_best=lowest) as again:
        assert again.steps == kept
        assert again.best_step == best
        assert again.restore(ARRAYS).step == 4
        restored = again.restore(ARRAYS, best)
        assert restored.metadata == {"step": best}
        np.testing.assert_array_equal(restored.arrays["params/a/kernel"], at(best)["params/a/kernel"])
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; there are \["):
            again.restore(ARRAYS, 9)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    grow = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        x = jnp.arange(1 << 20, dtype=jnp.float32)
        for step in range(3):
            checkpoints.save(step, {"x": x}, {})
            x = grow(grow(x))
        for step in range(3):
            scale = 4**step  # x -> 4x + 3, step times
            expected = np.arange(1 << 20, dtype=np.float32) * scale + (scale - 1)
            np.testing.assert_array_equal(checkpoints.restore({"x": x}, step).arrays["x"], expected)


# In a process of its own: a read that fails leaves tasks behind in orbax, which complain when its loop is closed.
RESTORE = """
import sys, jax.numpy as jnp
from easydel.checkpoints import Checkpoints
like = {"a": jnp.zeros((8, 4)), "step": jnp.int32(0)}
with Checkpoints(sys.argv[1], keep=None) as checkpoints:
    restored = checkpoints.restore(like, *map(int, sys.argv[2:]))
print("restored", restored.step, restored.metadata, float(restored.arrays["a"].sum()), flush=True)
"""


def restore_elsewhere(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RESTORE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_broken_checkpoint_is_passed_over_with_a_warning(tmp_path):
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"a": jnp.full((8, 4), float(step)), "step": jnp.int32(step)}, {"at": step})
    for file in (tmp_path / "4" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for file in (tmp_path / "3" / "state" / "d").iterdir():
        file.unlink()
    for file in (tmp_path / "2").rglob("*METADATA*"):
        file.write_text("{")
    done = restore_elsewhere(tmp_path)
    assert "restored 1 {'at': 1} 32.0" in done.stdout, done.stderr
    assert [f"{tmp_path}/{step}: " in done.stderr for step in (4, 3, 2, 1)] == [True, True, True, False]
    refused = restore_elsewhere(tmp_path, 4)
    assert refused.returncode
    assert "no checkpoint can be read" in refused.stderr


def test_what_is_being_written_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, at(1), {})
        checkpoints.wait()
        whole = {file.name for file in (tmp_path / "1").iterdir()}
    torn = tmp_path / "2"
    torn.mkdir()
    (torn / "metrics").mkdir()
    (torn / "metrics" / "metrics").write_text(json.dumps({}))
    (tmp_path / "3.orbax-checkpoint-tmp-1").mkdir()
    assert "state" in whole
    with Checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="/2: not a whole checkpoint"):
        assert checkpoints.restore(ARRAYS).step == 1
    assert not (tmp_path / "3.orbax-checkpoint-tmp-1").exists()


def test_keeping_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_no_room_is_told_in_bytes_and_leaves_the_checkpoint_before(tmp_path):
    """Files that may not grow stand for a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, at(1), {})
    checkpoints.wait()

    def save():
        checkpoints.save(2, at(2), {})
        checkpoints.wait()

    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"/2: the checkpoint could not be written: File too large") as told:
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"writes about {8 * 4 * 4 + 3 * 2 + 4} bytes of it; " in str(told.value)
    assert "Whole are those of steps [1]" in str(told.value)
    with Checkpoints(tmp_path) as again:
        assert int(again.restore(ARRAYS).arrays["step"]) == 8
