"""`supports`: whether a model can be accelerated, told before anybody loads or fits an adapter."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from runtime.base import find_base, from_pretrained, given_base
from runtime.decoding.families import check_config
from runtime.errors import ConfigError, UnsupportedModel
from runtime.exact.running import why_stock


@dataclass(frozen=True, slots=True)
class Support:
    """What `supports` found; true where the model can be accelerated.

    Attributes:
        supported: whether it can.
        reason: one line; where it cannot, which part is missing, and that plain decoding works.
    """

    supported: bool
    reason: str

    def __bool__(self) -> bool:
        return self.supported

    def __str__(self) -> str:
        return self.reason


def supports(model_or_config: Any) -> Support:
    """Whether a model can be accelerated; no adapter is loaded, and no weights.

    Args:
        model_or_config: a model of transformers or PEFT, a config, or the folder or Hub id of one. Of a loaded model
            the attention implementation, hooks and modules of others are looked at too.

    Returns:
        True or false, and why, in one line: `print(supports(model))`.

    Raises:
        AdapterError: no config can be loaded from the folder or Hub id.
        ConfigError: it is none of these.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        config = model_or_config
    else:
        given = given_base(model_or_config)
        if isinstance(given, PreTrainedModel):
            return _of_model(given)
        if given is None:
            raise ConfigError("model_or_config is None: expected a model, a config, a folder or a Hub id")
        config = from_pretrained(AutoConfig, find_base(given), {})
    try:
        check_config(config)
    except UnsupportedModel as error:
        return Support(False, str(error))
    return Support(True, f"model_type {config.model_type!r} is supported")


def _of_model(model: PreTrainedModel) -> Support:
    """As `supports`, of a loaded model."""
    reason = why_stock(model)
    if reason is None:
        return Support(True, f"{type(model).__name__} (model_type {model.config.model_type!r}) is supported")
    if "is not supported" not in reason:
        reason = f"{type(model).__name__} cannot be accelerated as it is: {reason}; plain decoding works"
    return Support(False, reason)
