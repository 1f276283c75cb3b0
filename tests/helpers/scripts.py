"""The files of `scripts/` as modules."""

import importlib.util
from types import ModuleType

from tests.helpers.paths import ROOT


def script(name: str) -> ModuleType:
    """A script as a module, by its path below `scripts/` without the ending."""
    spec = importlib.util.spec_from_file_location(f"script_{name.replace('/', '_')}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
