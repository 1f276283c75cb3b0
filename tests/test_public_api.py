"""What the packages promise: public names, who imports whom, what is never called, and the size of files."""

import ast
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

import runtime
from tests.helpers.paths import ROOT

RUNTIME = sorted((ROOT / "runtime").rglob("*.py"))
TRAIN = sorted((ROOT / "train").rglob("*.py"))
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "tqdm", "jinja2", "runtime"}
CLI = ROOT / "runtime" / "cli"
ALLOWED_IN_CLI = {"typer", "rich"}
# Of the `serve` and `grammar` extras: for the files of this folder alone, which no other file of the package imports.
SERVER = ROOT / "runtime" / "server"
ALLOWED_IN_SERVER = {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "llguidance", "ray"}
MAX_LINES = 400
UNSAFE_MODULES = {"cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load"}


def name(path):
    return str(path.relative_to(ROOT))


def imported(tree):
    """Top-level names of every module imported anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module != "pickle"
            yield node.module.partition(".")[0]


def called(tree):
    """Dotted names of everything called in the file, such as `torch.load`."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_the_public_names():
    assert runtime.__all__ == [
        "AdapterError",
        "BaseModelMismatch",
        "ConfigError",
        "DataError",
        "SpecBound",
        "SpecBoundConfig",
        "SpecBoundError",
        "SpeculationBounds",
        "SpeculationStats",
        "TemperatureSchedule",
        "UnsupportedModel",
        "detach",
        "load_adapter",
        "load_specbound",
        "save_adapter",
        "supports",
    ]
    for public in runtime.__all__:
        documentation = getattr(runtime, public).__doc__
        assert documentation and not documentation.startswith(public + "(")  # what dataclass would put there


def test_errors_are_also_the_standard_errors_they_stand_for():
    stands_for = {
        "ConfigError": ValueError,
        "DataError": ValueError,
        "AdapterError": OSError,
        "BaseModelMismatch": ValueError,
        "UnsupportedModel": NotImplementedError,
    }
    for public, standard in stands_for.items():
        assert issubclass(getattr(runtime, public), (runtime.SpecBoundError,))
        assert issubclass(getattr(runtime, public), standard)


def test_the_call_that_everything_begins_with():
    parameters = inspect.signature(runtime.load_specbound).parameters
    assert list(parameters)[:2] == ["adapter", "base_model"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])
    assert parameters["exactness"].default == "bitwise"


@pytest.mark.parametrize("path", RUNTIME, ids=name)
def test_runtime_imports_only_what_inference_needs(path):
    text = path.read_text(encoding="utf-8")
    found = set(imported(ast.parse(text)))
    in_server = SERVER in path.parents
    more = (ALLOWED_IN_SERVER if in_server else set()) | (ALLOWED_IN_CLI if CLI in path.parents else set())
    assert found <= ALLOWED | sys.stdlib_module_names | more
    assert in_server or path == CLI / "serve.py" or "runtime.server" not in text


@pytest.mark.parametrize("path", [path for path in (ROOT / "train").iterdir() if path.stem[:2] != "__"], ids=name)
def test_nothing_in_train_hides_a_library(path):
    """`accelerate launch train/fit_exits.py` puts train/ first on the import path."""
    assert path.stem not in sys.stdlib_module_names
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "train")]
    assert importlib.machinery.PathFinder.find_spec(path.stem, elsewhere) is None


@pytest.mark.parametrize("path", RUNTIME + TRAIN, ids=name)
def test_nothing_that_runs_what_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not UNSAFE_MODULES & set(imported(tree))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    uses = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "pickle"}
    assert uses <= {"PickleError"}
    calls = called(tree)
    assert not UNSAFE_CALLS & calls
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert "trust_remote_code" not in keywords


@pytest.mark.parametrize("path", RUNTIME + TRAIN, ids=name)
def test_files_are_short_ascii_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", RUNTIME, ids=name)
def test_public_names_have_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [tree.body] + [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    public = [node for body in bodies for node in body if isinstance(node, kinds) and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_checks_see_what_they_look_for():
    tree = ast.parse("def f():\n    import train.cli.app\n    from yaml import load\n    torch.load(eval(x))")
    assert set(imported(tree)) == {"train", "yaml"} and called(tree) == {"torch.load", "eval"}
