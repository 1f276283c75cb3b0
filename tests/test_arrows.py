"""Who may import whom: rooms in the order of docs/architecture.md, and no circle of files. Read off the AST."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# From the ground up: a room imports rooms before it, and those of its own line only where it is the same room.
ROOMS = [
    ["runtime.errors"],
    ["runtime.fields", "runtime.files", "runtime.stats"],
    ["runtime.drafting"],
    ["runtime.adapter"],
    ["runtime.conditions", "runtime.decoding"],
    ["runtime.base", "runtime.exact", "runtime.text"],
    ["runtime.handle", "runtime.support"],
    ["runtime.batch"],
    ["runtime.generate"],
    ["runtime.loading"],
    ["runtime.custom_generate", "runtime"],
    ["runtime.audit", "runtime.server"],
    ["runtime.cli"],
    ["train.optimizer", "train.settings"],
    ["train.corpus"],
    ["train.features"],
    ["train.calibration"],
    ["train.replay"],
    ["train.fitting"],
    ["train.evaluation", "train.planning"],
    ["train.publishing"],
    ["train.sweep"],
    ["train.distil", "train.cli"],
    ["train.fit_exits"],
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(path for package in ("runtime", "train") for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def room_of(module: str) -> str:
    """The folder or the single file below `runtime` or `train` that a module lies in."""
    return ".".join(module.split(".")[:2])


def imported(module: str, text: str) -> set[str]:
    """Modules of these packages that a file imports anywhere, without itself."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES or {node.module}
    return {name for name in found if name.split(".")[0] in ("runtime", "train")} - {module}


def wrong_arrows(module: str, text: str) -> list[str]:
    """Imports that do not go down."""
    room = room_of(module)
    return sorted(
        other
        for other in imported(module, text)
        if room_of(other) != room and RANK[room_of(other)] >= RANK[room] and room not in ("runtime", "train")
    )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_between_rooms_go_down(path: Path) -> None:
    """Every room has its place in the list, and what it imports lies below."""
    module = module_of(path)
    assert room_of(module) in RANK or module == "train"
    assert wrong_arrows(module, path.read_text(encoding="utf-8")) == []


def test_no_circle_of_files() -> None:
    """Those of one room included; packages only say what is in them, so what `runtime` exports does not count."""
    graph = {module_of(path): imported(module_of(path), path.read_text(encoding="utf-8")) for path in FILES}
    del graph["runtime"]
    list(TopologicalSorter({module: found - {"runtime"} for module, found in graph.items()}).static_order())


def test_the_checks_can_fail() -> None:
    """Negative control."""
    assert wrong_arrows("runtime.drafting.heads", "from runtime.exact import packed") == ["runtime.exact.packed"]
    assert wrong_arrows("train.corpus.prompts", "def f():\n    import train.fit_exits") == ["train.fit_exits"]
    assert wrong_arrows("runtime.exact.probe", "from runtime.decoding.cache import KVCache") == []
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
