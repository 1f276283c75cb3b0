"""Prompts: read from files or data sets, hashed, split, and kept apart from the evaluation texts.

A prompt is the messages to send first and the user turns that follow, each asked after the model's own answer
to the one before. Knows nothing of models, tokenizers or where the answers go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("fit", "calibration", "held_out")
ROLES = ("system", "developer", "user", "assistant", "tool")

_EXPECTED = "`prompt` (text), `turns` (user texts), `messages` (role and content) or `instruction` (text)"
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
_WORD = re.compile(r"[^\W_]+")
# 13 hexadecimal digits are 52 bits: a float64 holds the fraction exactly and never rounds it up to 1.
_HEX_DIGITS = 13


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
    """Read the prompts of `source`, in its order, duplicates included (`deduplicate` drops and counts them).

    Args:
        source: a `.jsonl` file, a `.json` file that holds a list, or a data set as `name` or `name:split`
            (split `train` unless given). Rows hold, looked for in this order, `prompt`, `turns`, `messages`
            (cut after the last user message) or `instruction` (and maybe `input`); null counts as absent.
        limit: read at most this many rows.

    A NUL or a lone surrogate, which tokenizers refuse, becomes U+FFFD, with a logged warning. Blank lines, a
    byte order mark and CRLF line ends are skipped over.

    Raises:
        DataError: the source cannot be read, holds no prompt, or a row is not one; names the file and line.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path)
    elif path.is_file():
        raise DataError(f"{source}: expected a .jsonl or .json file or a data set's name; convert it first")
    else:
        rows = _dataset_rows(source)
    prompts: list[Prompt] = []
    for where, row in rows:
        if limit is not None and len(prompts) >= limit:
            break
        prompt = _to_prompt(row, where=where)
        prompts.append(replace(prompt, task=str(row.get("category") or "")))
    if not prompts:
        raise DataError(f"{source}: no prompts in it (limit {limit}); expected rows with {_EXPECTED}")
    return prompts


def prompt_hash(messages: Sequence[Message], later_turns: Sequence[str] = ()) -> str:
    """The sha256, as 64 hexadecimal digits, of the canonical JSON of a prompt."""
    pairs = [(message.role, message.content) for message in messages]
    canonical = json.dumps({"later_turns": list(later_turns), "messages": pairs}, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def hash_fraction(digest: str, *, offset: int = 0) -> float:
    """A hash read as a uniform number in [0, 1), from its hexadecimal digits at `offset` on.

    Offsets 13 or more digits apart give independent numbers; a sha256 has room up to offset 51.
    """
    return int(digest[offset : offset + _HEX_DIGITS], 16) / 16**_HEX_DIGITS


def assign_split(digest: str, *, calibration_fraction: float, held_out_fraction: float) -> str:
    """The split, one of `SPLITS`, of the prompt with hash `digest`: the same in every run and corpus."""
    position = hash_fraction(digest)
    if position < held_out_fraction:
        return "held_out"
    return "calibration" if position < held_out_fraction + calibration_fraction else "fit"


def deduplicate(prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """The first of each group of equal prompts, in order, and the number of the others."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.hash, prompt)
    return list(unique.values()), len(prompts) - len(unique)


def ngram_filter(
    prompts: Iterable[Prompt], *, evaluation_files: Sequence[str], n: int = 13
) -> tuple[list[Prompt], list[Prompt]]:
    """Part the prompts into those to keep and those that share a run of `n` words with an evaluation text.

    Words are lower-cased runs of letters and digits. A text of fewer than `n` words is one run: it is caught
    only where it equals a whole evaluation text. `evaluation_files` are sources for `read_prompts`, such as a
    benchmark's `question.jsonl`. Returns the kept and the dropped prompts, each in order.

    Raises:
        DataError: an evaluation file cannot be read.
    """
    forbidden: set[tuple[str, ...]] = set()
    for source in evaluation_files:
        for prompt in read_prompts(source):
            forbidden.update(*(_ngrams(text, n=n) for text in prompt.texts))
    kept: list[Prompt] = []
    dropped: list[Prompt] = []
    for prompt in prompts:
        shared = any(gram in forbidden for text in prompt.texts for gram in _ngrams(text, n=n))
        (dropped if shared else kept).append(prompt)
    return kept, dropped


def _ngrams(text: str, *, n: int) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    for start in range(max(len(words) - n, 0) + 1 if words else 0):
        yield tuple(words[start : start + n])


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
        raise DataError(f"{where}: not usable JSON ({error}); expected a row with {_EXPECTED}") from error


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


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and files do not need it

    name, split = source.split(":", 1) if ":" in source else (source, "train")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the loader raises many kinds; the user needs one line
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise DataError(
            f"{source}: no such file, and split {split!r} of data set {name!r} could not be loaded"
            f" ({reason}); give a .jsonl or .json file, `name` or `name:split`"
        ) from error
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def _to_prompt(row: Any, *, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {_EXPECTED}, got {type(row).__name__}")
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
    raise DataError(f"{where}: expected {_EXPECTED}; found {', '.join(sorted(row)) or 'no field'}")


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
