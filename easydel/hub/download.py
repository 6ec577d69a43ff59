"""Hub id → snapshot directory, fetching only the files a load needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easydel.errors import CheckpointError

LIGHT = ("config.json", "generation_config.json", "README.md")


def download_snapshot(name: str, subfolder: str, **options: Any) -> Path:
    """Return the local directory of `name` (and `subfolder`), with config, tokenizer and one form of weights.

    First the small files and `model.safetensors`; if there is none, the shards its index names; if there is no
    safetensors file at all, `pytorch_model*.bin`. All from the commit that the first request resolved.

    Raises:
        CheckpointError: unknown repository or revision, no access, or no network and nothing cached.
    """
    from easydel.hub.resolve import INDEX, SINGLE, TEMPLATES, TOKENIZER_FILES, read_index

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    light = [*LIGHT, *TOKENIZER_FILES, f"{TEMPLATES}/*", INDEX, SINGLE]
    root = _fetch(name, [prefix + pattern for pattern in light] + light[:-2], options)
    directory = root / subfolder if subfolder else root
    if (directory / SINGLE).is_file():
        return directory
    if (directory / INDEX).is_file():
        wanted = sorted(set(read_index(directory / INDEX, ".safetensors").values()))
    else:
        wanted = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    _fetch(name, [prefix + pattern for pattern in wanted], {**options, "revision": root.name})
    return directory


def download_adapter(name: str, subfolder: str, **options: Any) -> Path:
    """Return the local directory of the PEFT adapter `name` (and `subfolder`).

    Raises:
        CheckpointError: as `download_snapshot`.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    small = [f"{prefix}adapter_config.json", f"{prefix}adapter_model.safetensors"]
    root = _fetch(name, small, options)
    directory = root / subfolder if subfolder else root
    if not (directory / "adapter_model.safetensors").is_file():
        _fetch(name, [f"{prefix}adapter_model.bin"], {**options, "revision": root.name})
    return directory


def _fetch(name: str, patterns: Sequence[str], options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a directory here nor a valid Hub id ({error})") from error
    except (HfHubHTTPError, transport_error(), OSError, ValueError) as error:
        raise CheckpointError(_explain(name, error, options)) from error


def transport_error() -> type[Exception]:
    """Return the base class of what the Hub's HTTP library raises (httpx or httpx2, whichever the client uses)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error of the Hub's client carries, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(name: str, error: Exception, options: dict[str, Any]) -> str:
    """Return what went wrong with a download, and the cure."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"Hub repository {name!r} is gated: accept its terms on its page and pass token="
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name!r} is neither a directory here ({os.getcwd()}) nor a repository on the Hub that this token "
            "may see; check the spelling, or pass token= for a private one"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"Hub repository {name!r} has no revision {options.get('revision')!r}; see its branches and tags there"
    if status_of(error) in (401, 403):
        return f"the Hub refuses this token for {name!r}; log in again, or pass a valid token= (or token=False)"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name!r} is not a directory here, not (wholly) in the Hub cache, and could not be downloaded "
            f"(local_files_only={options.get('local_files_only')}): {error}; go online once, or check the connection"
        )
    return f"downloading {name!r} from the Hub failed: {error}; whole files that arrived are kept, so try again"
