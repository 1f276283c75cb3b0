"""`Source`: a file or a data set that prompts are read from, how much of it, and which columns. Reads nothing."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import parse_qsl

import yaml

from runtime.errors import ConfigError
from train.settings.recipe import convert, refuse_unknown

# Ends of names that are files, also with `.gz` behind them.
ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")


@dataclass(frozen=True, slots=True)
class Source:
    """A file or a data set, and what is read of it.

    As text it is `FILE`, `NAME` or `NAME:SPLIT`, with settings behind a question mark, such as
    `answers.csv?column=question&limit=1000`; in a recipe it may be a mapping of the same names, `path` among them.

    Attributes:
        path: a file, a pattern such as `data/*.parquet`, or the name of a data set.
        split: split of a data set.
        subset: configuration of a data set that has several, such as `main`.
        streaming: read a data set over the network row by row, without a download of all; with `limit`.
        limit: rows read at most.
        weight: share of this source among those with one: as many rows are taken as keep the shares, none twice.
        column: where the prompt, the conversation or the text is; None looks for a name that is known.
        answer: where the answer is; None looks for a name that is known.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    streaming: bool = False
    limit: int | None = None
    weight: float | None = None
    column: str | None = None
    answer: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read the form of a recipe's list and of the command line.

        Raises:
            ConfigError: a setting is unknown or has no usable value.
        """
        path, _, query = (text, "", "") if Path(text).exists() else text.partition("?")
        pairs = dict(parse_qsl(query, keep_blank_values=True))
        kinds = get_type_hints(cls)
        refuse_unknown(pairs, known=[field.name for field in fields(cls)][1:], where=text)
        given: dict[str, Any] = {}
        for name, value in pairs.items():
            is_text = str in (kinds[name], *get_args(kinds[name]))
            given[name] = convert(value if is_text else yaml.safe_load(value), kinds[name], where=f"{text}: {name}")
        if not names_file(path) and ":" in path:
            path, _, split = path.partition(":")
            given = {"split": split} | given
        source = cls(path, **given)
        for name in ("limit", "weight"):
            if (value := getattr(source, name)) is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{text}: {name}: expected a number above 0; got {value!r}")
        if not path or (source.streaming and source.limit is None):
            raise ConfigError(f"{text}: expected {'a limit with streaming' if path else 'a file or a name'}")
        return source

    @property
    def is_file(self) -> bool:
        """Whether it is a file or a pattern of files, not a data set's name."""
        return names_file(self.path)


def names_file(path: str) -> bool:
    """Whether a path ends as a file does that can be read, is one, or is a pattern of several."""
    return path.lower().removesuffix(".gz").endswith(ENDINGS) or "*" in path or Path(path).is_file()
