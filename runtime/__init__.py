"""SpecBound's runtime: exact self-speculative decoding for transformers models, from a small adapter."""

from runtime.adapter import load_adapter, save_adapter
from runtime.config import SpecBoundConfig
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
from runtime.policy import SpeculationBounds
from runtime.stats import SpeculationStats
from runtime.temperature import TemperatureSchedule

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
]
