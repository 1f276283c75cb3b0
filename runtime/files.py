"""Writing a file so that it is the old one or the new one, never half of it. Knows nothing of what is written.

An error of the disk names its file, whatever library wrote it; `disk_line` has the words for the end of a command.
"""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from runtime.errors import ConfigError, SpecBoundError

# What a disk says to a writer: it is full, or it takes nothing.
FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM = "make room there and run the same command again"
DISK = (*FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_BY_RUST = re.compile(r"\(os error (\d+)\)")  # in what safetensors says


def write_atomic(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write `data` to `path`, through a temporary file beside it, flushed to disk before it takes the name.

    Args:
        data: the bytes, or what writes them to a file, or to the path that is the file's `name`.

    Raises:
        OSError: the folder cannot be made or written; what was at `path` is as it was.
    """
    with naming(path, anew=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)


def _replace(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
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


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, all of it or nothing.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    with growing(path), path.open("ab") as file:
        file.write(data)


@contextmanager
def growing(path: Path) -> Iterator[None]:
    """Within `with`: what is added to a file is taken away again after an error, which then names the file."""
    before = path.stat().st_size if path.exists() else 0
    with naming(path):
        try:
            yield
        except BaseException:
            with suppress(OSError):
                os.truncate(path, before)
            raise


@contextmanager
def naming(path: Path, *, anew: bool = False) -> Iterator[None]:
    """Within `with`: an error of the disk names this file or folder, if it was raised by a library that names none.

    Args:
        anew: also if it names one, such as a temporary file.

    Raises:
        OSError: in the place of whatever the library raised.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None or (_path(error) is not None and not anew):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def disk_line(error: BaseException) -> str | None:
    """One line for an error of the disk: which file, why, and what to do; None for any other error."""
    number = _number(error)
    if number is None:
        return None
    path, reason = _path(error) or "a file", os.strerror(number)
    if number in FULL:
        return f"{path} cannot be written ({reason}): {ROOM}"
    return f"{path} cannot be used ({reason}): see to its disk and rights, or name another, and run the command again"


def is_full(error: BaseException) -> bool:
    """Whether a disk had no room for what was written."""
    return _number(error) in FULL


def _path(error: BaseException) -> str | None:
    """The file that an error names; of two the one that was written."""
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return None if path is None else os.fsdecode(path) if isinstance(path, str | bytes | Path) else None


def _number(error: BaseException) -> int | None:
    """The number of an error of the disk; None of any other, and of those that have their words."""
    if isinstance(error, SpecBoundError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _BY_RUST.search(str(error))):
        number = int(found[1])
    return number if number in DISK else None


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
