"""`from_pretrained(id)` and `push_to_hub` with the real client against the Hub of `server.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import easydel
from easydel.errors import CheckpointError
from tests.hub import checkpoint as ck
from tests.hub.server import Hub, Repo, serve

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own upload
FILES = {"config.json", ck.SINGLE}


@pytest.fixture(scope="module")
def running() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, emptied, with the client pointed at it and at an empty cache."""
    template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {
        "ENDPOINT": running.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True, "HF_HUB_DISABLE_TELEMETRY": True,
        "DOWNLOAD_CHUNK_SIZE": 100,  # what has arrived of an unfinished chunk is thrown away
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it resumes
    huggingface_hub.close_session()
    for table in (running.repos, running.log, running.blobs, running.cut, running.broken):
        table.clear()
    return running


def publish(hub: Hub, folder: Path, name: str = "org/tiny", prefix: str = "", **options: Any) -> Repo:
    """Put a checkpoint and much that nobody needs into a repository."""
    if not folder.exists():
        ck.write(folder)
    files = {prefix + str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    junk = dict.fromkeys(("tf_model.h5", "pytorch_model.bin", "onnx/model.onnx", "image.png"), b"x" * 2000)
    hub.repos[name] = Repo(**options)
    hub.repos[name].commit(files | junk, "first")
    return hub.repos[name]


def load(name: str = "org/tiny", **options: Any) -> Any:
    return easydel.LlamaForCausalLM.from_pretrained(name, **options)


def test_only_what_is_needed_and_once(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m")
    ck.assert_equal(load(), ck.tensors())
    assert set(hub.fetched()) == FILES
    hub.log.clear()
    ck.assert_equal(easydel.AutoEasyDeLModelForCausalLM.from_pretrained("org/tiny"), ck.tensors())
    assert hub.fetched() == []
    load(force_download=True)
    assert set(hub.fetched()) == FILES


def test_shards_of_the_index_only(hub: Hub, tmp_path: Path) -> None:
    folder = ck.write(tmp_path / "m")
    ck.write_sharded(folder, ck.tensors())
    (folder / "stray.safetensors").write_bytes(b"none of it")
    publish(hub, folder)
    ck.assert_equal(load(), ck.tensors())
    assert set(hub.fetched()) == {"config.json", ck.INDEX, "a.safetensors", "b.safetensors"}


def test_pickle_only_when_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = ck.write(tmp_path / "m")
    (folder / ck.SINGLE).unlink()
    repo = publish(hub, folder)
    torch.save({n: torch.from_numpy(a) for n, a in ck.tensors().items()}, tmp_path / "w.bin")
    settings = {"config.json": json.dumps(ck.CONFIG).encode()}
    sha = repo.commit(settings | {"pytorch_model.bin": (tmp_path / "w.bin").read_bytes()})
    ck.assert_equal(load(), ck.tensors())
    repo.commit(settings | {"tf_model.h5": b"x"})
    with pytest.raises(CheckpointError, match="no weights"):
        load()
    ck.assert_equal(load(revision=sha), ck.tensors())


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    repo = publish(hub, tmp_path / "m")
    first = repo.refs["main"]
    new = ck.write(tmp_path / "n", ck.tensors(1))
    files = {path.name: path.read_bytes() for path in new.iterdir()}
    repo.commit(files, ref="experiment")
    ck.assert_equal(load(revision="experiment"), ck.tensors(1))
    ck.assert_equal(load(), ck.tensors(0))
    repo.commit(files)
    ck.assert_equal(load(), ck.tensors(1))
    ck.assert_equal(load(revision=first), ck.tensors(0))
    with pytest.raises(CheckpointError, match="'org/tiny' has no revision 'nowhere'"):
        load(revision="nowhere")


def test_subfolder(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m", prefix="step-3/")
    ck.assert_equal(load(subfolder="step-3"), ck.tensors())
    assert set(hub.fetched()) == {f"step-3/{name}" for name in FILES}
    with pytest.raises(CheckpointError, match=r"subfolder|config\.json"):
        load(subfolder="step-4")


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, tmp_path / "m")
    with pytest.raises(CheckpointError, match="local_files_only=True"):
        load(local_files_only=True)
    assert hub.log == []
    load()
    hub.log.clear()
    ck.assert_equal(load(local_files_only=True), ck.tensors())
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    ck.assert_equal(load(), ck.tensors())
    with pytest.raises(CheckpointError, match=r"not a directory here, not .* in the Hub cache"):
        load("org/other")
    assert hub.log == []
    huggingface_hub.close_session()


def test_no_server(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(ck.write(tmp_path / "m")))
    dead = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    with pytest.raises(CheckpointError, match="check the connection"):
        load()
    with pytest.raises(CheckpointError, match=r"(?s)nothing was committed.*Check the connection"):
        model.push_to_hub("me/x", token="hf_write")


def test_private(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m", private=True)
    publish(hub, tmp_path / "m", name="org/gated", gated=True)
    with pytest.raises(CheckpointError, match="pass token= for a private one"):
        load()
    with pytest.raises(CheckpointError, match=r"refuses this token|may see") as caught:
        load(token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(CheckpointError, match="is gated: accept its terms"):
        load("org/gated")
    ck.assert_equal(load(token="hf_read"), ck.tensors())


def test_unknown(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory here .* nor a repository"):
        load("org/none")
    with pytest.raises(CheckpointError, match="valid Hub id"):
        load("org/no ne")


def test_an_interrupted_download_resumes(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m")
    size = (tmp_path / "m" / ck.SINGLE).stat().st_size
    hub.cut[ck.SINGLE] = [700]
    ck.assert_equal(load(), ck.tensors())
    assert f"bytes=700-{size - 1}" in ranges(hub) or "bytes=700-" in ranges(hub)


def test_after_a_broken_download(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m")
    hub.cut[ck.SINGLE] = [700] + [0] * 7
    with pytest.raises(CheckpointError, match=r"downloading 'org/tiny' from the Hub failed.*try again"):
        load()
    with pytest.raises(CheckpointError, match="in the Hub cache"):
        load(local_files_only=True)  # half a model is no model
    hub.log.clear()
    hub.cut.clear()
    ck.assert_equal(load(), ck.tensors())
    assert hub.fetched() == [ck.SINGLE]  # what had arrived whole is kept; this client begins the rest anew


def ranges(hub: Hub) -> list[str | None]:
    return [wanted for do, path, wanted in hub.log if do == "GET" and path.endswith(ck.SINGLE)]


def test_push(hub: Hub, tmp_path: Path) -> None:
    model = load(str(ck.write(tmp_path / "m")))
    url = model.push_to_hub("me/new", "a message", private=True, token="hf_write")
    repo = hub.repos["me/new"]
    assert repo.private
    assert [commit.message for commit in repo.commits.values()] == ["initial commit", "a message"]
    sha = repo.refs["main"]
    assert url.endswith(sha)
    files = repo.commits[sha].files
    assert set(files) == {*FILES, "generation_config.json", "README.md", ".gitattributes"}
    assert b"library_name: easydel" in files["README.md"]
    ck.assert_equal(load("me/new", token="hf_read"), ck.tensors())


def test_push_again(hub: Hub, tmp_path: Path) -> None:
    """In shards over a single file, keeping the card, and only the branch that was named."""
    model = load(str(ck.write(tmp_path / "m")))
    repo = publish(hub, tmp_path / "m", name="me/old")
    first = repo.commit(repo.commits[repo.refs["main"]].files | {"README.md": b"my words"})
    model.push_to_hub("me/old", token="hf_write", max_shard_size="1KB")
    files = repo.commits[repo.refs["main"]].files
    assert len(repo.commits) == 3
    assert files["README.md"] == b"my words"
    assert ck.SINGLE not in files
    assert set(json.loads(files[ck.INDEX])["weight_map"].values()) <= set(files)
    assert "image.png" in files
    ck.assert_equal(load("me/old"), ck.tensors())
    model.push_to_hub("me/old", token="hf_write", revision="next")
    assert len(repo.commits) == 4
    ck.assert_equal(load("me/old", revision="next"), ck.tensors())
    assert first in repo.commits


def test_push_as_a_pull_request(hub: Hub, tmp_path: Path) -> None:
    model = load(str(ck.write(tmp_path / "m")))
    repo = publish(hub, tmp_path / "m", name="me/old")
    main = repo.refs["main"]
    assert model.push_to_hub("me/old", token="hf_write", create_pr=True).endswith("/discussions/1")
    assert repo.refs["main"] == main
    ck.assert_equal(load("me/old", revision="refs/pr/1"), ck.tensors())


@pytest.mark.parametrize("token", ["hf_wrong", "hf_read", False])
def test_push_without_permission(hub: Hub, tmp_path: Path, token: Any) -> None:
    model = load(str(ck.write(tmp_path / "m")))
    with pytest.raises(CheckpointError, match=r"(?s)uploading to 'me/x' failed.*token= that may write") as caught:
        model.push_to_hub("me/x", token=token)
    assert not token or token not in str(caught.value)
    assert not hub.repos
    assert not hub.blobs


@pytest.mark.parametrize("place", ["preupload", "objects/batch", "^/lfs/", "/commit/"])
def test_push_that_breaks_commits_nothing(hub: Hub, tmp_path: Path, place: str) -> None:
    model = load(str(ck.write(tmp_path / "m")))
    repo = publish(hub, tmp_path / "m", name="me/old")
    before = dict(repo.refs)
    hub.broken.add(place)
    with pytest.raises(CheckpointError, match="nothing was committed"):
        model.push_to_hub("me/old", token="hf_write")
    assert repo.refs == before
    assert len(repo.commits) == 1


def test_push_to_a_name_that_is_none(hub: Hub, tmp_path: Path) -> None:
    model = load(str(ck.write(tmp_path / "m")))
    with pytest.raises(CheckpointError, match="not a valid Hub id"):
        model.push_to_hub("me/a b", token="hf_write")
    assert hub.log == []
