"""The documentation is true where a program can see it: snippets parse or run, what it names exists."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.helpers.paths import ROOT
from train.cli.app import app
from train.settings.fit_config import FitConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
VERBS: Any = typer.main.get_command(app)
TESTS = {
    path.stem: set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    for path in (ROOT / "tests").rglob("test_*.py")
}


def blocks(page: Path, language: str) -> list[str]:
    """Fenced code of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every shell line, from the program on: without variables before it and redirections."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.split(r" [<>&]( |$)", line)[0], comments=True)
            starts = [index for index, word in enumerate(words) if word in ("specbound", "python", "accelerate")]
            if starts:
                found.append(words[starts[0] :])
    return found


def mentions(page: Path) -> list[list[str]]:
    """Commands within a sentence, which may leave things out."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [span.split() for span in re.findall(r"`((?:specbound|python)\s[^`]+)`", text)]


def check_options(words: list[str]) -> None:
    """The verb or script exists, and takes these options."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if words[0] == "specbound":
        if words[1].startswith("--") or words[1].isupper():
            return
        verb = VERBS.commands[words[1]]
        known = {name for parameter in verb.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert set(options) <= known | {"--help"}, words
        return
    script = next(word for word in words[1:] if word.endswith(".py"))
    text = (ROOT / script).read_text(encoding="utf-8")
    if script == "train/fit_exits.py":
        text = " ".join(FitConfig.__dataclass_fields__) + " config"
    for option in options if words[0] == "python" else []:
        name = option.removeprefix("--")
        assert name in text or name.replace("-", "_") in text, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_parse(page: Path) -> None:
    """Python is Python; every shell command is complete, every option exists."""
    for block in blocks(page, "python"):
        session = [line[4:] for line in block.splitlines() if line.startswith((">>> ", "... "))]
        ast.parse("\n".join(session) or block)
    for words in commands(page):
        check_options(words)
        if words[0] == "specbound":  # whole, with every argument it needs and none of a wrong kind
            VERBS.commands[words[1]].make_context(words[1], words[2:])
    for words in mentions(page):
        check_options(words)


def test_the_checks_can_fail() -> None:
    """Negative control."""
    assert sum(len(commands(page)) for page in PAGES) > 12 and sum(len(mentions(page)) for page in PAGES) > 20
    with pytest.raises(KeyError):
        check_options(["specbound", "conjure"])
    for words in (["specbound", "bench", "--no-such"], ["python", "scripts/measure/growth.py", "--no-such"]):
        with pytest.raises(AssertionError):
            check_options(words)
    with pytest.raises(Exception, match="adapter"):
        VERBS.commands["generate"].make_context("generate", ["text"])


def quick_commands() -> list[list[str]]:
    """Those that a tiny model answers in seconds."""
    found = [words for page in PAGES for words in [*commands(page), *map(shlex_words, mentions(page))]]
    found = [[word.replace("$ADAPTER", "adapters/smollm2-135m-instruct") for word in words] for words in found]
    wanted = {"generate", "inspect", "chat"}
    whole = [
        words for words in found if words[0] == "specbound" and words[1] in wanted and "adapters/" in " ".join(words)
    ]
    return [list(words) for words in dict.fromkeys(map(tuple, whole))]


def shlex_words(words: list[str]) -> list[str]:
    """A mention with its quotes undone."""
    return shlex.split(" ".join(words))


def test_commands_run(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that looks like the repository after the demo, with a tiny base in the real one's place."""
    monkeypatch.chdir(demo_outputs)
    prompts = demo_outputs / "configs" / "data" / "demo_prompts.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text('{"prompt": "w5 w9"}\n{"prompt": "w3"}\n', encoding="utf-8")
    chosen = quick_commands()
    assert len(chosen) >= 4
    for words in chosen:
        result = CliRunner().invoke(app, words[1:], input="w5 w9\n")
        assert result.exit_code == 0 and result.stdout, (words, result.stderr)


@pytest.mark.parametrize("page", [ROOT / "docs" / "index.md"], ids=lambda page: page.stem)
def test_python_runs(page: Path, demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pages have tests of their own: test_readme.py, test_server.py (serving.md), test_hub.py (hub.md)."""
    monkeypatch.chdir(demo_outputs)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "faults").glob("*.md")), ids=lambda page: page.stem)
def test_the_tests_of_faults_exist(page: Path) -> None:
    named = re.findall(r"`((?:test_|::test_)[\w.:]+)`", page.read_text(encoding="utf-8"))
    assert len(named) > 20
    for line in page.read_text(encoding="utf-8").splitlines():
        last = ""
        for name in re.findall(r"`((?:test_|::test_)[\w.:]+)`", line):
            file, _, test = name.removesuffix(".py").replace(".py::", "::").partition("::")
            last = file or last  # `::test_b` after `test_file::test_a` is of the same file
            where = TESTS[last] if test else set().union(*TESTS.values(), TESTS)
            assert exists(test or file, where), f"{page.name} names {name}"


def exists(name: str, among: set[str]) -> bool:
    """Whether there is such a name; one that ends in dots is the beginning of one."""
    start = name.rstrip(".")
    return name in among or (start != name and any(one.startswith(start) for one in among))


def test_faults_of_the_list_are_all_there() -> None:
    """Adapters, Hub, publishing and serving: each number has a row."""
    text = (ROOT / "docs" / "faults" / "runtime.md").read_text(encoding="utf-8")
    told = {int(number) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for number in row.split(",")}
    assert set(range(32, 55)) | set(range(70, 81)) <= told


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_files_that_pages_name_exist(page: Path) -> None:
    """Paths from the top of the repository, in backquotes."""
    named = re.findall(r"`((?:runtime|train|scripts|tests|docs|configs)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_missing_tests_are_noticed() -> None:
    """Negative control."""
    assert not exists("test_of_nothing", set().union(*TESTS.values()))
    assert not exists("test_of_nothing_...", set().union(*TESTS.values()))
    assert exists("test_the_checks_...", TESTS["test_docs"])
