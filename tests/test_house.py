"""The rules of the house that a program can check: sizes of files, functions and folders, and who imports tests."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PRODUCT = [path for folder in ("runtime", "train", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 250
MAX_FUNCTION_LINES = 50
MAX_FILES = 15
FULL = {"docs/results"}  # one file a measurement
LONG_FUNCTIONS: set[str] = set()


def name(path: Path) -> str:
    """As pytest shows it."""
    return str(path.relative_to(ROOT))


def long_functions(text: str) -> list[str]:
    """Functions of a source that do not fit on a screen, their docstrings aside."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [node.name for node in functions if lines_of(node) - docstring_lines(node) > MAX_FUNCTION_LINES]


def lines_of(node: ast.AST) -> int:
    """From the first to the last."""
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined, no-any-return]


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines that only say what the function does."""
    return lines_of(node.body[0]) if ast.get_docstring(node) is not None else 0


def test_files_are_short() -> None:
    """They fit on a few screens, without exceptions."""
    long = {name(path) for path in PRODUCT + TESTS if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES}
    assert not long


def test_functions_are_short() -> None:
    """Those that are not are named above."""
    long = {
        f"{name(path)}::{function}"
        for path in PRODUCT + TESTS
        for function in long_functions(path.read_text(encoding="utf-8"))
    }
    assert long == LONG_FUNCTIONS


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_imports_another(path: Path) -> None:
    """What tests share lies in tests/helpers."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    modules = [(node.module or "").rpartition(".")[2] for node in nodes]
    assert not any(module.startswith("test_") for module in modules)


def test_folders_are_small() -> None:
    """Tracked files, without the folders below."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = [str(Path(line).parent) for line in listed.stdout.splitlines()]
    full = {folder for folder in set(folders) if folders.count(folder) > MAX_FILES}
    assert full <= FULL


def test_the_checks_can_fail() -> None:
    """Negative control."""
    assert long_functions("def f():\n" + "    x = 1\n" * 50) == ["f"]
