"""Write the end of docs/fitting.md: every setting of a fit, its default and what it means. Read off the code.

Example: python scripts/settings.py
"""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from train.settings.fit_config import CHOICES, FitConfig
from train.settings.source import Source

PAGE = Path(__file__).resolve().parent.parent / "docs" / "fitting.md"
HEADING = "## All settings"
TABLE = """

Each is a line of a recipe (`--config FILE.yaml`) and a flag (`--learning_rate 1e-3`); flags win. An unknown name or a
value out of its range is refused before anything is loaded. This table is made by `python scripts/settings.py`.

| setting | value | default | meaning |
|---|---|---|---|
"""
SOURCES = """
### Of a source

An entry of `prompts` or `evaluation_files` is a path or a name, with these behind a question mark
(`answers.csv?column=question&limit=1000`); in a recipe it may be a mapping of them, such as
`{path: answers.csv, column: question}`.

| setting | value | default |
|---|---|---|
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page: what is written by hand, then one line a setting."""
    written = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    kinds = get_type_hints(FitConfig)
    lines = [
        f"| `{one.name}` | {value(one.name, kinds[one.name])} | {default(one)} | {one.metadata['help']} |\n"
        for one in dataclasses.fields(FitConfig)
        if one.init
    ]
    kinds = get_type_hints(Source)
    sources = [
        f"| `{one.name}` | {value('', kinds[one.name])} | {default(one)} |\n" for one in dataclasses.fields(Source)
    ]
    return written + HEADING + TABLE + "".join(lines) + SOURCES + "".join(sources)


def value(name: str, kind: Any) -> str:
    """What may be given, in words."""
    if name in CHOICES:
        return ", ".join(CHOICES[name])
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return f"list of {words[get_args(kind)[0]]}s" if get_origin(kind) is list else words[kind]


def default(one: dataclasses.Field[Any]) -> str:
    """The default; a setting without one is needed."""
    if one.default is dataclasses.MISSING:
        return "needed" if one.default_factory is dataclasses.MISSING else "none"
    if one.default is None:
        return "none"
    return f"`{str(one.default).lower() if isinstance(one.default, bool) else one.default}`"


if __name__ == "__main__":
    main()
