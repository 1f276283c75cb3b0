"""Where adapters and bases are: in a folder, or on the Hub. Knows nothing of what is in them."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from runtime.adapter.config import VERSION
from runtime.errors import AdapterError, ConfigError, one_line

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

# Never all of a repository: only what an adapter consists of, and what `specbound inspect` shows.
FILES = ["config.json", "model.safetensors", "calibration.json", "run.yaml", "README.md"]

# The class that all errors of the Hub's HTTP library derive from; its name differs between huggingface_hub's versions.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
RETRIED = (408, 429, 500, 502, 503, 504)
WAITS = (0.5, 1.0, 2.0)  # seconds before each further try


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
        ConfigError: not a name; or a revision of a folder.
    """
    if not isinstance(adapter, (str, os.PathLike)) or not os.fspath(adapter):
        raise ConfigError(
            f"adapter is {adapter!r:.100}: expected the adapter's folder, or its Hub id such as ORG/NAME"
        )
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
    if not is_hub_id(str(adapter)):
        raise AdapterError(f"{adapter!s:.200} does not exist: expected the adapter's folder, or a Hub id ORG/NAME")
    try:
        return Path(
            patiently(
                lambda: snapshot_download(
                    str(adapter),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=FILES,
                    library_name="specbound",
                    library_version=VERSION,
                )
            )
        )
    except Exception as error:  # the transport's own errors are of a library that is not imported here
        raise AdapterError(f"{adapter} is no folder here, and the Hub could not give it: {one_line(error)}") from None


def is_hub_id(name: str) -> bool:
    """Whether a repository of the Hub may have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def kept_base(name: str) -> Path:
    """Where `scripts/fetch_smollm2.py` keeps a base, by its Hub id: in the Hub's cache, for any folder to find."""
    return Path(constants.HF_HOME) / "specbound" / "bases" / name.replace("/", "--")


def patiently(call: Callable[[], Answer]) -> Answer:
    """Call until the Hub answers, a few times: connections drop, and servers are busy for a moment."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # other libraries wrap the transport's errors in their own
            if not _is_passing(error):
                raise
            logger.info("the Hub failed (%s), next try in %g s", one_line(error), wait)
            time.sleep(wait)
    return call()


def _is_passing(error: BaseException) -> bool:
    """Whether an error of the transport is behind this one, of a kind that another try may not meet."""
    for cause in chain_of(error):
        if isinstance(cause, TRANSPORT_ERROR):
            response = getattr(cause, "response", None)
            return response is None or response.status_code in RETRIED
    return False


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
