"""Prompts: the messages to send first, and the user turns that follow. Read from files; knows no tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.errors import DataError

logger = logging.getLogger(__name__)

FILES = (".jsonl", ".json")
ROLES = ("system", "developer", "user", "assistant", "tool")

EXPECTED = "`prompt` (text), `turns` (user texts), `messages` (role and content) or `instruction` (text)"
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation: its role, one of `ROLES`, and its text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """`messages` end with a user's; each of `later_turns` is asked after the answer to the turn before.

    `task` is what a benchmark calls the prompt's kind; it is no part of the prompt.
    """

    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()
    task: str = field(default="", compare=False)

    @property
    def hash(self) -> str:
        """The sha256 of the whole prompt, 64 hexadecimal digits."""
        return prompt_hash(self.messages, self.later_turns)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of every message and later turn, in order."""
        return (*(message.content for message in self.messages), *self.later_turns)


def read_prompts(source: str, *, limit: int | None = None) -> list[Prompt]:
    """The prompts of a `.jsonl` file, or of a `.json` file that holds a list, in its order, duplicates included.

    Rows hold, looked for in this order, `prompt`, `turns`, `messages` (cut after the last user message) or
    `instruction` (and maybe `input`); null counts as absent. A NUL or a lone surrogate, which tokenizers refuse,
    becomes U+FFFD, with a logged warning. Blank lines, a byte order mark and CRLF line ends are skipped over.

    Args:
        limit: read at most this many rows.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a row is not one; names the file and line.
    """
    path = Path(source)
    if path.suffix not in FILES:
        raise DataError(f"{source}: expected a .jsonl or .json file; convert it first")
    return to_prompts(_jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path), source, limit)


def to_prompts(rows: Iterable[tuple[str, Any]], source: str, limit: int | None) -> list[Prompt]:
    """The prompts of rows, each with the words for where it stands.

    Raises:
        DataError: there is none, or a row is not one.
    """
    prompts = [_to_prompt(row, where=where) for where, row in islice(rows, limit)]
    if not prompts:
        raise DataError(f"{source}: no prompts in it (limit {limit}); expected rows with {EXPECTED}")
    return prompts


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """`limit` of the prompts at even distances, so that a file sorted by subject is seen whole."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // limit] for index in range(limit)]


def prompt_hash(messages: Sequence[Message], later_turns: Sequence[str] = ()) -> str:
    """The sha256, as 64 hexadecimal digits, of the canonical JSON of a prompt."""
    pairs = [(message.role, message.content) for message in messages]
    canonical = json.dumps({"later_turns": list(later_turns), "messages": pairs}, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give an existing file") from error


def _parse(data: bytes, *, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg}, its line {error.lineno} column {error.colno});"
            " expected a row per line in a .jsonl file, or one list of rows in a .json file"
        ) from error
    except (ValueError, RecursionError) as error:  # an endless number; brackets nested too deeply
        raise DataError(f"{where}: not usable JSON ({error}); expected a row with {EXPECTED}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Split on line feeds alone: JSON text may hold U+2028, which str.splitlines takes for a line end.
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse(line, where=where)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    data = _read_bytes(path)
    rows = _parse(data, where=str(path)) if data.strip() else []  # an empty file has its own error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of rows, got {type(rows).__name__}; make it a list")
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _to_prompt(row: Any, *, where: str) -> Prompt:
    """The prompt that a row of a file or data set holds; `category` names its task.

    Raises:
        DataError: it holds none; `where` says which row.
    """
    prompt = _prompt_of(row, where=where)
    return replace(prompt, task=str(row.get("category") or ""))


def _prompt_of(row: Any, *, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {EXPECTED}, got {type(row).__name__}")
    if row.get("prompt") is not None:
        return Prompt((Message("user", _text(row["prompt"], field="prompt", where=where)),))
    if row.get("turns") is not None:
        turns = _list(row["turns"], field="turns", where=where)
        texts = [_text(turn, field=f"turns[{index}]", where=where) for index, turn in enumerate(turns)]
        return Prompt((Message("user", texts[0]),), tuple(texts[1:]))
    if row.get("messages") is not None:
        return Prompt(_messages(_list(row["messages"], field="messages", where=where), where=where))
    if row.get("instruction") is not None:
        text = _text(row["instruction"], field="instruction", where=where)
        if row.get("input"):
            text += "\n\n" + _text(row["input"], field="input", where=where)
        return Prompt((Message("user", text),))
    raise DataError(f"{where}: expected {EXPECTED}; found {', '.join(sorted(row)) or 'no field'}")


def _messages(entries: list[Any], *, where: str) -> tuple[Message, ...]:
    is_user = [isinstance(entry, dict) and entry.get("role") == "user" for entry in entries]
    if not any(is_user):
        raise DataError(f"{where}: expected `messages` to hold one of role `user`; found none")
    messages = []
    for index, entry in enumerate(entries[: len(entries) - is_user[::-1].index(True)]):
        if not isinstance(entry, dict) or entry.get("role") not in ROLES:
            raise DataError(f"{where}: expected `messages[{index}]` to have a `role` of {', '.join(ROLES)}")
        content = _text(entry.get("content"), field=f"messages[{index}].content", where=where)
        messages.append(Message(entry["role"], content))
    return tuple(messages)


def _list(value: Any, *, field: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected `{field}` to be a list that is not empty, got {value!a:.60}")
    return value


def _text(value: Any, *, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: expected `{field}` to be text that is not empty, got {value!a:.60}")
    cleaned = _UNUSABLE.sub("\ufffd", value)
    if cleaned != value:
        logger.warning("%s: `%s` holds a NUL or a lone surrogate, replaced by U+FFFD", where, field)
    return cleaned
