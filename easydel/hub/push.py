"""Upload a saved model to the Hub in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

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
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing was committed.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="easydel-push-") as folder:
        write(Path(folder))  # first, so that a model that cannot be saved leaves no empty repository behind
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        readme = Path(folder, "README.md")
        if card is not None and not readme.exists() and not api.file_exists(repo_id, "README.md", revision=revision):
            readme.write_text(card)
        info = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
            create_pr=create_pr, delete_patterns=list(STALE),
        )  # fmt: skip
    return str(info.pr_url or info.commit_url)
