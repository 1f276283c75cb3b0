"""The rows of a file or a data set as they are, each with words for where it stands. Knows no conversations."""

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from runtime.adapter.hub import patiently
from runtime.errors import DataError, one_line
from train.corpus.conversation import Unusable
from train.settings.source import ENDINGS, Source

LINES = (".jsonl", ".json", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
MARKS = {",": "commas", "\t": "tabs", ";": "semicolons"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
FOUND = ", ".join(ENDINGS)


def read_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row: an object of its columns, or an `Unusable` where it is none.

    Raises:
        DataError: a file or data set cannot be read.
    """
    if not source.is_file:
        yield from _data_set(source)
        return
    for path, ending in files_of(source):
        if ending in BUILDERS:
            yield from _built(path, ending)
            continue
        try:
            yield from _table(path, TABLES[ending]) if ending in TABLES else _json(path)
        except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            advice = "save it as UTF-8" if isinstance(error, UnicodeError) else "give an existing file"
            raise DataError(f"{path}: cannot be read ({reason}); {advice}") from error


def files_of(source: Source) -> list[tuple[str, str]]:
    """The files of a source, each with the ending that says how to read it; none where it is a data set.

    Raises:
        DataError: no file has such a name, or nothing says how to read one.
    """
    if not source.is_file:
        return []
    paths = sorted(glob.glob(source.path)) if "*" in source.path else [source.path]
    if not paths:
        raise DataError(f"{source.path}: no file has such a name")
    endings = [Path(path.lower().removesuffix(".gz")).suffix for path in paths]
    for path, ending in zip(paths, endings, strict=True):
        if ending not in (*BUILDERS, *TABLES, *LINES):
            raise DataError(f"{path}: expected a file that ends in {FOUND}; name it so if it is one, or convert it")
        if "://" not in path and not Path(path).exists():
            raise DataError(f"{path}: cannot be read (No such file or directory); give an existing file")
    return list(zip(paths, endings, strict=True))


def _json(path: str) -> Iterator[tuple[str, Any]]:
    """The objects of a file, one a line or in one list."""
    with _opened(path) as file:
        first = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if first.startswith(b"[") and ".jsonl" not in path.lower():
            yield from _list(path, file.read())
            return
        # In binary a line ends at a line feed alone; JSON text may hold U+2028, which is another end of a line.
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield f"line {number}", _parsed(line)


def _table(path: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The rows of a table with a line of names; every cell is text, also one with a number in it."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter)
        names = next(filter(None, rows), [])
        if len(names) == 1 and (found := [mark for mark in MARKS if mark != delimiter and mark in names[0]]):
            raise DataError(
                f"{path}: its first line has {MARKS[found[0]]} and no {MARKS[delimiter]}, so it is one name,"
                f" {names[0]!a:.60}: save it with {MARKS[delimiter]} between the columns"
            )
        begins = rows.line_num + 1  # a row may go over several lines: cells in quotes may hold line breaks
        for cells in rows:
            where, begins = f"line {begins}", rows.line_num + 1
            if any(cells[len(names) :]):
                too_many = f"more cells than the {len(names)} columns; put those with a separator in quotes"
                yield where, Unusable(too_many)
            elif cells:
                yield where, dict(zip_longest(names, cells[: len(names)]))


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _list(path: str, data: bytes) -> Iterator[tuple[str, Any]]:
    rows = _parsed(data)
    if isinstance(rows, Unusable):
        raise DataError(f"{path}: {rows}; expected one list of rows, or a row a line")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unusable("not UTF-8 text")
    except json.JSONDecodeError:
        return Unusable("not valid JSON")
    except (ValueError, RecursionError):  # an endless number; brackets nested too deeply
        return Unusable("not usable JSON")


def _built(path: str, ending: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file that `datasets` reads piece by piece."""
    import datasets  # slow to import

    try:
        rows = datasets.load_dataset(BUILDERS[ending], data_files=[path], split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except Exception as error:  # the builders raise many kinds; the user needs one line
        raise DataError(f"{path}: cannot be read as {ending[1:]} ({_kind(error)}); give an existing file") from error


def _data_set(source: Source) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and most files do not need it

    where = f"split {source.split!r} of data set {source.path!r}"
    try:
        rows = patiently(
            lambda: datasets.load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming)
        )
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", row
    except DataError:
        raise
    except Exception as error:  # the loader raises many kinds
        raise DataError(
            f"{source.path}: no such file, and {where} could not be loaded ({_kind(error)}); give a file that ends in"
            f" {FOUND}, or `name`, `name:split`"
        ) from error


def _kind(error: Exception) -> str:
    """The error in one line; that of a builder stands behind its own."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"{type(cause).__name__}: {one_line(cause)}"
