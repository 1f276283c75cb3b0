"""Bodies of requests in OpenAI's form, and its form of errors. Knows no model.

What cannot be honoured is refused, never ignored, unless it is at the value that changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
# What changes nothing, by field; any other value is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "echo": (None, False),
    "suffix": (None, ""),
}
# A number so small that scores divided by it are no longer finite.
MIN_TEMPERATURE = 1e-6
# As many as OpenAI's chats take.
MAX_LOGPROBS = 20


class ApiError(Exception):
    """An error as OpenAI's clients read it.

    Args:
        status: of HTTP.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """What the response holds."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes beside it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class _Strict(BaseModel):
    """No unknown fields, and no text where a number is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream holds besides text."""

    include_usage: bool = False


class Speculation(_Strict):
    """Our own part of a request, `specbound`.

    Attributes:
        enabled: False is plain decoding.
        rounds: streams tell what drafted each token.
    """

    enabled: bool = True
    rounds: bool = False


class Request(_Strict):
    """What chats and completions share.

    Attributes:
        max_tokens: of the answer.
        seed: gives the ids that `torch.manual_seed(seed)` and `model.generate` give.
        temperature: 0 is greedy; None, with no `top_p` or `top_k` either, does as the model's own defaults say.
        top_k: not OpenAI's; 0 switches off the 50 that transformers takes by default.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    specbound: Speculation = Speculation()
    user: str | None = None
    metadata: dict[str, str] | None = None
    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    @field_validator(*NEUTRAL, check_fields=False)
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> Any:
        if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
                   for neutral in NEUTRAL[info.field_name]):  # fmt: skip
            raise ValueError("is not supported by this server: leave it out")
        return value

    @field_validator("temperature")
    @classmethod
    def _divisible(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"must be 0, for greedy decoding, or at least {MIN_TEMPERATURE:g}")
        return value

    @property
    def stop_strings(self) -> list[str]:
        """As a list, whatever form it came in."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self) -> dict[str, Any]:
        """Options of `generate`; those not asked for are left to it."""
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in asked.items() if value is not None}
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True} | given if given else {}


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        """Clients send answers back with everything they hold, most of it null."""
        return {key: value for key, value in fields.items() if value is not None} if type(fields) is dict else fields

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None

    @model_validator(mode="after")
    def _asked(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """So many of the likeliest tokens are told beside each one; None tells no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(Request):
    """Body of /v1/completions: one prompt, as text, as a list of one text, or as token ids."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | list[int]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def num_logprobs(self) -> int | None:
        """So many of the likeliest tokens are told beside each one; None tells no probabilities."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most; 16 where none is given, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens
