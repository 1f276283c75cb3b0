"""Writing a file so that it is the old one or the new one, never half of it. Knows nothing of what is written."""

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from runtime.errors import ConfigError


def write_atomic(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write `data` to `path`, through a temporary file beside it, flushed to disk before it takes the name.

    Args:
        data: the bytes, or what writes them to a file.

    Raises:
        OSError: the folder cannot be made or written; what was at `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(data) if isinstance(data, bytes) else data(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def check_writable(path: Path) -> None:
    """Look whether a file can be written there, before hours of work are done for it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another file") from None


def _umask() -> int:
    """Rights that new files do not get; a temporary file has fewer than the user's other files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
