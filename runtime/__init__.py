"""SpecBound's runtime: exact self-speculative decoding for transformers models, from a small adapter.

Names are imported when they are first asked for: the command line's help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.adapter.config import SpecBoundConfig
    from runtime.adapter.folder import load_adapter, save_adapter
    from runtime.drafting.policy import SpeculationBounds
    from runtime.drafting.temperature import TemperatureSchedule
    from runtime.errors import (
        AdapterError,
        BaseModelMismatch,
        ConfigError,
        DataError,
        SpecBoundError,
        UnsupportedModel,
    )
    from runtime.generate import detach
    from runtime.handle import SpecBound
    from runtime.loading import load_specbound
    from runtime.stats import SpeculationStats
    from runtime.support import supports

__all__ = [
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
_MODULES = {
    "SpecBound": "handle",
    "SpecBoundConfig": "adapter.config",
    "SpeculationBounds": "drafting.policy",
    "SpeculationStats": "stats",
    "TemperatureSchedule": "drafting.temperature",
    "detach": "generate",
    "load_adapter": "adapter.folder",
    "load_specbound": "loading",
    "save_adapter": "adapter.folder",
    "supports": "support",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    value = getattr(import_module(f"runtime.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
