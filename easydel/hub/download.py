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


def _fetch(name: str, patterns: Sequence[str], options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a directory here nor a valid Hub id ({error})") from error
    except GatedRepoError as error:
        raise CheckpointError(f"Hub repository {name!r} is gated: accept its terms and pass token=") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is neither a directory here ({os.getcwd()}) nor a repository on the Hub that this token "
            "may see; check the spelling, or pass token= for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"Hub repository {name!r} has no revision {options.get('revision')!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is not a directory here, not in the Hub cache, and could not be downloaded "
            f"(local_files_only={options.get('local_files_only')}): {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"downloading {name!r} from the Hub failed: {error}") from error
