"""Loading, a forward pass, training, generating and saving give the same in several processes as in one."""

from __future__ import annotations

import functools
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from easydel.infra.views import param_arrays
from tests.distributed.launch import run
from tests.distributed.models import batch_of, make_checkpoint, model_class, read_so_far, share_of

STEPS = 20
PIECE = 32768
"""Bytes, in place of the 64 MB that arrays are gathered in: an eighth of the largest tensor."""


def everything(family: str, source: str, target: str, ways: tuple[str, ...]) -> dict[str, Any]:
    """Do all a model can, and generate in some ways; return what came of it."""
    import optax

    from easydel import EasyDeLState
    from easydel.distributed import whole
    from easydel.training import TrainStep, evaluate
    from easydel.training.sources import place_batch

    cls = model_class(family)
    cls.from_pretrained(source, auto_shard_model=True)  # imports and compiles whatever is read or compiled once
    before = read_so_far()
    model = cls.from_pretrained(source, auto_shard_model=True)
    found: dict[str, Any] = {"read": read_so_far() - before, "share": share_of(model)}
    ids = batch_of(0)["input_ids"]
    found["logits"] = whole(jax.jit(model.pure_transform_fn())(model.params, {"input_ids": ids}).logits)
    found |= {way: generated(model, ids, way) for way in ways}
    state = model.to_state(optax.sgd(0.05))
    batches = [place_batch(batch_of(number), model.mesh) for number in (98, 99)]
    found["evaluated"] = evaluate(state.graphdef, state.params, state.other, batches)["eval_loss"]
    step = TrainStep(state, keep=False)
    found["losses"] = [float(step(place_batch(batch_of(number), model.mesh))["loss"]) for number in range(STEPS)]
    trained = step.state.model
    found |= saved(trained, f"{target}/model")
    step.state.save_state(f"{target}/state")
    again = EasyDeLState.load_state(f"{target}/state", optax.sgd(0.05), mesh=model.mesh)
    reloaded = cls.from_pretrained(f"{target}/model", auto_shard_model=True)
    for name, params in (("model", reloaded.params), ("state", again.params)):
        pairs = zip(jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True)
        found[f"{name} is the same"] = all(bool((one == other).all()) for one, other in pairs)
    found["params"] = {path: np.asarray(array) for path, array in param_arrays(trained.gather_model()).items()}
    return found


def generated(model: Any, ids: np.ndarray, way: str) -> np.ndarray:
    """Generate; eight rows are split over the devices, fewer are not."""
    prompts = ids[:, :6]
    if way == "stream":
        return np.array(list(model.stream(prompts, max_new_tokens=5, max_time=1e4)))
    if way == "many":
        return np.array(model.generate_many([row[: 4 + n] for n, row in enumerate(ids[:5])], max_new_tokens=4))
    if way == "beams":
        return np.asarray(model.generate(prompts[:2], max_new_tokens=4, num_beams=2).sequences)
    options: dict[str, Any] = {"do_sample": True, "seed": 1} if way == "sampled" else {}
    return np.asarray(model.generate(prompts, max_new_tokens=5, **options).sequences)


def saved(model: Any, target: str) -> dict[str, int]:
    """Save a model and measure what the process holds meanwhile: on the host, and in pieces on a device."""
    from easydel.distributed import gather

    piece, pieces = gather._piece, []

    def watched(*arguments: Any) -> Any:
        made = piece(*arguments)
        pieces.append(made.addressable_data(0).nbytes)
        return made

    gather._piece, gather.PIECE = watched, PIECE
    model.save_pretrained(target, max_shard_size="600KB")  # compiles
    tracemalloc.start()
    model.save_pretrained(target, max_shard_size="600KB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gather._piece, gather.PIECE = piece, 64 * 2**20
    return {"peak on the host": peak, "largest piece": max(pieces, default=0)}


@pytest.fixture(scope="module")
def alone_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function: a family's name → a checkpoint of it, and what a single process makes of that."""

    @functools.cache
    def made(name: str, ways: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(name)
        make_checkpoint(name, folder / "source")
        alone = everything(name, str(folder / "source"), str(folder / "one"), ways)
        return str(folder / "source"), alone

    return made


@pytest.mark.parametrize(
    ("name", "processes", "devices", "ways"),
    [
        ("llama", 2, 4, ("greedy", "sampled", "stream")),
        ("mixtral", 4, 2, ()),
        pytest.param("llama", 4, 2, ("beams", "many"), marks=pytest.mark.slow),
        pytest.param("mixtral", 2, 4, ("greedy",), marks=pytest.mark.slow),
    ],
)
def test_several_processes_do_what_one_does(
    alone_of: Any, name: str, processes: int, devices: int, ways: tuple[str, ...], tmp_path: Path
) -> None:
    source, alone = alone_of(name, ways)
    results = run(everything, processes, devices, name, source, str(tmp_path), ways)
    for found in results:
        # Sums over devices are taken in another order: about 1e-7 of a term, of which there are some hundred.
        np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5)
        assert found["losses"][-1] < 0.9 * found["losses"][0]
        np.testing.assert_allclose(found["evaluated"], alone["evaluated"], rtol=1e-5)
        np.testing.assert_allclose(found["logits"], alone["logits"], atol=1e-4)
        for way in ways:
            np.testing.assert_array_equal(found[way], alone[way])
        assert found["model is the same"]
        assert found["state is the same"]
    check_reads(results, Path(source))
    check_memory(results, alone)
    check_files(tmp_path / "model", results[0]["params"], name)


def check_reads(results: list[dict[str, Any]], source: Path) -> None:
    """A process reads its share; besides, each reads the header and the two configs."""
    file = source / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for found in results:
        assert found["share"] < 0.6 * file.stat().st_size
        assert found["share"] <= found["read"] <= 1.05 * found["share"] + header


def check_memory(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """No process holds more than its share, a tensor with its transposed copy, and a piece."""
    sizes = [array.nbytes for array in alone["params"].values()]
    assert sum(sizes) > 3 * (2 * max(sizes))
    for found in results:
        assert found["peak on the host"] < 2 * max(sizes) + 300_000  # headers, names, the interpreter's own
        assert found["largest piece"] <= PIECE


def check_files(folder: Path, params: dict[str, np.ndarray], name: str) -> None:
    """Many files, which a single process reads as the model that was trained."""
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    for path, array in param_arrays(model_class(name).from_pretrained(folder)).items():
        np.testing.assert_array_equal(np.asarray(array), params[path])
