"""Upload a saved model to the Hub in one commit."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from easydel.distributed import by_first
from easydel.errors import CheckpointError
from easydel.hub.download import status_of, transport_error

# Weights of an earlier upload that this one does not overwrite: an old `model.safetensors` would win over new shards.
STALE = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def push_to_hub(
    write: Callable[[Path], None],
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Create the repository if needed, write the model into a temporary directory and upload it in one commit.

    Args:
        write: saves the model into the directory it is given.
        repo_id: `org/name`; created if it does not exist.
        commit_message: first line of the commit.
        card: text for `README.md`, used if neither the directory nor the repository has one.
        private: whether a new repository is private; `None` is the organisation's default.
        token: a token that may write.
        revision: branch to commit to (created if needed); `None` is the main one.
        create_pr: open a pull request instead.

    Returns:
        The URL of the commit (or of the pull request).

    Raises:
        CheckpointError: the Hub refused or cannot be reached; nothing was committed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(token=token)

    def upload(folder: Path) -> str:
        nonlocal repo_id
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            readme = folder / "README.md"
            if (
                card is not None
                and not readme.exists()
                and not api.file_exists(repo_id, readme.name, revision=revision)
            ):
                readme.write_text(card)
            info = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                create_pr=create_pr, delete_patterns=list(STALE),
            )  # fmt: skip
        except HFValidationError as error:
            raise CheckpointError(f"{repo_id!r} is not a valid Hub id such as 'user/name': {error}") from error
        except (transport_error(), OSError, ValueError, RuntimeError) as error:  # the last: a failed LFS transfer
            raise CheckpointError(_explain(repo_id, error)) from error
        return str(info.pr_url or info.commit_url)

    with contextlib.ExitStack() as held:
        name = by_first(lambda: held.enter_context(tempfile.TemporaryDirectory(prefix="easydel-push-")))
        write(Path(name))  # first, so that a model that cannot be saved leaves no empty repository behind
        return by_first(lambda: upload(Path(name)))


def _explain(repo_id: str, error: Exception) -> str:
    refused = f"uploading to {repo_id!r} failed, nothing was committed: {error}"
    if status_of(error) in (401, 403):
        return f"{refused}. Log in (`hf auth login`) or pass a token= that may write there"
    return f"{refused}. Check the connection and try again"
