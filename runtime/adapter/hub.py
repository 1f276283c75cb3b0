"""Where an adapter is: a folder on disk, or a repository on the Hub. Knows nothing of what is in it."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from runtime.adapter.config import VERSION
from runtime.errors import AdapterError, ConfigError

# Never all of a repository: only what an adapter consists of, and what `specbound inspect` shows.
FILES = ["config.json", "model.safetensors", "calibration.json", "run.yaml", "README.md"]


def resolve_adapter(
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Folder of an adapter: itself, or the snapshot of a Hub repository.

    Raises:
        AdapterError: neither a folder nor a repository that can be read.
        ConfigError: a revision of a folder.
    """
    try:
        path = Path(adapter)
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(adapter)[:100]!a} cannot be looked up: {error}") from None
    if is_folder and revision is not None:
        raise ConfigError(f"revision is {revision!r}, but {adapter} is a folder: leave it out, or give a Hub id")
    if is_folder:
        return path
    if exists:
        raise AdapterError(f"{adapter} is not a folder: expected the adapter's folder or a Hub id")
    try:
        found = snapshot_download(
            str(adapter),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=FILES,
            library_name="specbound",
            library_version=VERSION,
        )
    except HFValidationError:
        raise AdapterError(f"{adapter!s:.200} is neither a folder nor a Hub id of the form ORG/NAME") from None
    except Exception as error:  # the transport's own errors are of a library that is not imported here
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{adapter} is no folder here, and the Hub could not give it: {first}") from None
    return Path(found)
