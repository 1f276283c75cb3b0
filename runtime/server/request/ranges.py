"""Types of fields that chats, completions and responses share: their ranges, as checked and as told."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

# A number so small that scores divided by it are no longer finite.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 2.0
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 64
MAX_BIAS = 100
# More digits than any vocabulary's ids have; Python itself reads no more than 4,300. One id is written in one way.
ID = "(0|[1-9][0-9]{0,11})"


def _listed(stop: Any) -> Any:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"{len(strings)} strings are too many: this server takes at most {MAX_STOP_STRINGS}")
    if not all(1 <= len(one) <= MAX_STOP_LENGTH for one in strings):
        raise ValueError(f"each string must have 1 to {MAX_STOP_LENGTH} characters")
    return strings


def _divisible(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0, for greedy decoding, or at least {MIN_TEMPERATURE:g}")
    return value


def _of_ids(bias: dict[str, float]) -> dict[str, float]:
    if not all(re.fullmatch(ID, key) and abs(value) <= MAX_BIAS for key, value in bias.items()):
        raise ValueError(f"must give token ids, as text, numbers from -{MAX_BIAS} to {MAX_BIAS}")
    return bias


# What the document says of them.
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOPS = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOP_STRINGS}]}
_TEMPERATURES = {"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": MAX_TEMPERATURE}]}
_BIASES = {
    "type": "object",
    "propertyNames": {"pattern": f"^{ID}$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
}

_TOKENS = {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}]}


def _some(tokens: int) -> int:
    if tokens != -1 and tokens < 1:
        raise ValueError("must be at least 1, or -1 for as many as there is room for")
    return tokens


MaxTokens = Annotated[int, AfterValidator(_some), WithJsonSchema(_TOKENS)]
Stop = Annotated[list[str], BeforeValidator(_listed), WithJsonSchema(_STOPS)]
StopIds = Annotated[list[Annotated[int, Field(ge=0, lt=10**12)]], Field(max_length=MAX_STOP_IDS)]
Temperature = Annotated[
    float,
    Field(ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False),
    AfterValidator(_divisible),
    WithJsonSchema(_TEMPERATURES),
]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Bias = Annotated[dict[str, float], AfterValidator(_of_ids), WithJsonSchema(_BIASES)]
