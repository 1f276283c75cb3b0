"""SpecBound's runtime: exact self-speculative decoding for transformers models, from a small adapter."""

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
