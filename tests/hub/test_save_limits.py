"""Saving where it cannot work, and several saves at once: the model that was there stays whole."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import easydel
from easydel.errors import CheckpointError
from tests.hub import checkpoint as ck


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[easydel.LlamaForCausalLM]:
    found = []
    for number in range(2):
        folder = ck.write(tmp_path_factory.mktemp("source"), ck.tensors(number))
        found.append(easydel.LlamaForCausalLM.from_pretrained(folder))
    return found


def load(folder: Path) -> easydel.LlamaForCausalLM:
    return easydel.LlamaForCausalLM.from_pretrained(folder)


def mount(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which one model finds room, but not a second beside it."""
    yield from mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=20k", "tmpfs")


@pytest.mark.parametrize("size", ["5GB", "1KB"])
@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk(
    models: list[easydel.LlamaForCausalLM], small_disk: Path, size: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models[0].save_pretrained(small_disk)
    (small_disk / "notes.txt").write_text("mine")
    before = ck.state_of(small_disk)
    if not known:  # the space runs out while files are being written
        usage = type("Usage", (), {"free": 10**9})
        monkeypatch.setattr("easydel.hub.save.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"(disk has [\d,]+ free|disk is full).*nothing was changed"):
        models[1].save_pretrained(small_disk, max_shard_size=size)
    assert ck.state_of(small_disk) == before
    ck.assert_equal(load(small_disk), ck.tensors(0))


def test_a_file_size_limit(models: list[easydel.LlamaForCausalLM], tmp_path: Path) -> None:
    """Quotas and such: writing fails half-way, on any system."""
    models[0].save_pretrained(tmp_path / "m")
    before = ck.state_of(tmp_path)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
        for folder in ("m", "new/deep"):
            with pytest.raises(CheckpointError, match=r"disk is full.*nothing was changed"):
                models[1].save_pretrained(tmp_path / folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert ck.state_of(tmp_path) == before
    ck.assert_equal(load(tmp_path / "m"), ck.tensors(0))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    source = ck.write(tmp_path / "source")
    yield from mount(tmp_path / "ro", "--bind", "-o", "ro", str(source))


def test_a_read_only_disk(models: list[easydel.LlamaForCausalLM], read_only: Path) -> None:
    ck.assert_equal(load(read_only), ck.tensors(0))
    before = ck.state_of(read_only)
    for folder in (read_only, read_only / "new"):
        with pytest.raises(CheckpointError, match=r"Read-only file system"):
            models[1].save_pretrained(folder)
    assert ck.state_of(read_only) == before


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way(models: list[easydel.LlamaForCausalLM], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is a file|cannot be made"):
        models[0].save_pretrained(tmp_path / place)
    assert ck.state_of(tmp_path).keys() == {"file"}


@pytest.mark.parametrize("fresh", [True, False])
def test_several_saves_at_once(models: list[easydel.LlamaForCausalLM], tmp_path: Path, fresh: bool) -> None:
    """Single files and shards from many writers: the last one wins, whole, and nothing is left of the others."""
    if not fresh:
        models[0].save_pretrained(tmp_path, max_shard_size="1KB")
    failures: list[BaseException] = []

    def save(number: int, size: str) -> None:
        try:
            for _ in range(4):
                models[number].save_pretrained(tmp_path, max_shard_size=size)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(i % 2, ("5GB", "1KB")[i // 2])) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    got = ck.loaded(load(tmp_path))
    assert any(all((got[name] == array).all() for name, array in ck.tensors(number).items()) for number in range(2))
    weights = {path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    assert not list(tmp_path.glob(".easydel*"))
    assert (ck.SINGLE in weights) == (len(weights) == 1)


def test_a_writer_beside_readers(models: list[easydel.LlamaForCausalLM], tmp_path: Path) -> None:
    """A reader gets one model or the other, or an error that says the files were replaced."""
    models[0].save_pretrained(tmp_path)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = 1 - number
            models[number].save_pretrained(tmp_path, max_shard_size=("5GB", "1KB")[number])

    writer = threading.Thread(target=write)
    writer.start()
    refusals: list[str] = []
    try:
        for _ in range(5):
            try:
                got = ck.loaded(load(tmp_path))
            except CheckpointError as error:
                text = str(error)
                assert "load again" in text or "No such file" in text or "no such file" in text, text
                continue
            assert any(all((got[n] == a).all() for n, a in ck.tensors(number).items()) for number in range(2))
    finally:
        stop.set()
        writer.join()
    assert all(re.search("load again|[Nn]o such file|no weights", text) for text in refusals), refusals
