"""`Space`: the settings that a sweep varies, and between which values. Read from a YAML file; fits nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from runtime.errors import ConfigError
from train.settings.fit_config import FitConfig, validate
from train.settings.recipe import convert, read_mapping, refuse_unknown

# Whatever leaves the corpus as it is, so that all trials are judged on the same text.
VARIED = (
    "exit_layers", "head", "head_rank", "draft_vocab_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate", "optimizer", "weight_decay",
    "warmup_ratio", "max_grad_norm", "kl_weight", "teacher_top_k", "seed", "schedule",
)  # fmt: skip
EXPECTED = "expected a list of values, or {low: ..., high: ...} with log: true or step: ... if wanted"


@dataclass(frozen=True, slots=True)
class Space:
    """Settings of a recipe that vary.

    Attributes:
        distributions: of each setting, as Optuna has them. A value that is a list is its text there.
    """

    distributions: dict[str, BaseDistribution]

    @classmethod
    def read(cls, path: Path, config: FitConfig) -> "Space":
        """Read a file of lines `setting: [values]` or `setting: {low: ..., high: ..., log: true}`.

        Args:
            config: the recipe, with which each value must make a valid fit.

        Raises:
            ConfigError: the file is no such file, or a setting cannot vary or have a value.
        """
        content = read_mapping(path)
        types = get_type_hints(FitConfig)
        refuse_unknown([str(name) for name in content], known=types, where=str(path))
        if fixed := [name for name in content if name not in VARIED]:
            raise ConfigError(f"{path}: {fixed[0]} is the same in all trials; what may vary: {', '.join(VARIED)}")
        if not content:
            raise ConfigError(f"{path}: nothing varies; {EXPECTED}, of: {', '.join(VARIED)}")
        found = {name: _distribution(given, types[name], f"{path}: {name}") for name, given in content.items()}
        space = cls(found)
        try:
            for settings in space.ends():
                validate(replace(config, **settings))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        return space

    def ends(self) -> Iterator[dict[str, Any]]:
        """Settings with one varied: each of its values, or the lowest and the highest."""
        for name, one in self.distributions.items():
            assert isinstance(one, CategoricalDistribution | IntDistribution | FloatDistribution)
            for end in one.choices if isinstance(one, CategoricalDistribution) else (one.low, one.high):
                yield self.settings({name: end})

    def settings(self, params: dict[str, Any]) -> dict[str, Any]:
        """Settings of a recipe from Optuna's parameters."""
        kinds = get_type_hints(FitConfig)
        return {name: _value(value, kinds[name]) for name, value in params.items()}

    def params_of(self, config: FitConfig) -> dict[str, Any] | None:
        """A recipe's own values as Optuna's parameters; None where one of them lies outside."""
        own = {name: _param(getattr(config, name)) for name in self.distributions}
        for name, one in self.distributions.items():
            try:
                if not one._contains(one.to_internal_repr(own[name])):
                    return None
            except ValueError:  # not among the choices
                return None
        return own

    @property
    def num_combinations(self) -> float:
        """How many trials differ; infinite where a setting varies continuously."""
        return math.prod(map(_number, self.distributions.values()))

    def combinations(self) -> list[dict[str, Any]]:
        """All of them, as Optuna's parameters; only where their number is finite."""
        names = list(self.distributions)
        return [dict(zip(names, one, strict=True)) for one in product(*map(_steps, self.distributions.values()))]


def _distribution(given: Any, kind: Any, where: str) -> BaseDistribution:
    """What a line of the file means."""
    if isinstance(given, list) and given:
        choices = [_param(convert(value, kind, where=where)) for value in given]
        return CategoricalDistribution(list(dict.fromkeys(choices)))
    is_number = kind in (int, float)
    if not isinstance(given, dict) or not is_number or not {"low", "high"} <= set(given):
        raise ConfigError(f"{where}: {EXPECTED if is_number else EXPECTED.partition(',')[0]}; got {given!r}")
    refuse_unknown([str(key) for key in given], known=("low", "high", "log", "step"), where=where)
    ends = [key for key in ("low", "high", "step") if key in given]
    numbers = {key: convert(given[key], kind, where=f"{where}: {key}") for key in ends}
    log = convert(given.get("log", False), bool, where=f"{where}: log")
    if not numbers["low"] < numbers["high"]:
        raise ConfigError(f"{where}: expected low below high; got {given!r}")
    try:
        return (IntDistribution if kind is int else FloatDistribution)(**numbers, log=log)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; got {given!r}") from None


def _number(one: BaseDistribution) -> float:
    """How many values there are."""
    if isinstance(one, CategoricalDistribution):
        return len(one.choices)
    assert isinstance(one, IntDistribution | FloatDistribution)
    return math.inf if one.step is None else round((one.high - one.low) / one.step) + 1


def _steps(one: BaseDistribution) -> list[Any]:
    """All values, of which there is a finite number."""
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    assert isinstance(one, IntDistribution | FloatDistribution) and one.step is not None
    return [one.low + index * one.step for index in range(int(_number(one)))]


def _param(value: Any) -> Any:
    """A setting as Optuna holds it, which knows no lists."""
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _value(param: Any, kind: Any) -> Any:
    """What `_param` was made from."""
    return [get_args(kind)[0](part) for part in param.split()] if get_origin(kind) is list else param
