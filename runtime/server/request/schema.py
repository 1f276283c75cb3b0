"""Bodies of requests in OpenAI's form. Knows no model.

What cannot be honoured is refused, never ignored, unless it is at the value that changes nothing.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from runtime.server.request.messages import Conversation
from runtime.server.request.neutral import describe_body, without_neutral
from runtime.server.request.ranges import MaxTokens
from runtime.server.request.sampling import Sampling
from runtime.server.request.strict import Strict, check_object
from runtime.server.request.tools import ResponseFormat

# As many as OpenAI's chats take.
MAX_LOGPROBS = 20
MAX_CHOICES = 128
# What the document says of fields that are taken in several forms.
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXT = {"type": "string", "minLength": 1}
PROMPT_SCHEMA = {"anyOf": [TEXT, IDS, {"type": "array", "items": {"anyOf": [TEXT, IDS]}, "minItems": 1}]}


class StreamOptions(Strict):
    """What a stream holds besides text.

    Attributes:
        include_usage: at its end, how many tokens there were.
        continuous_usage_stats: and with each piece of a choice, how many it has so far; vLLM's.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False

    @field_validator("include_obfuscation")
    @classmethod
    def _plain(cls, value: bool) -> bool:
        if value:
            raise ValueError("is not supported by this server: leave it out")
        return value


class Speculation(Strict):
    """Our own part of a request, `specbound`.

    Attributes:
        enabled: False is plain decoding.
        rounds: streams of chats and completions tell what drafted each token.
    """

    enabled: bool = True
    rounds: bool = False


class Request(Sampling):
    """What chats and completions share.

    Attributes:
        max_tokens: of the answer; `max_completion_tokens` is its other name, and wins; -1 is as many as there is room
            for, as llama.cpp has it.
        n: so many answers to each prompt; the seed of each is one more than that of the one before.
    """

    model_config = ConfigDict(json_schema_extra=describe_body)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    specbound: Speculation = Speculation()

    @model_validator(mode="before")
    @classmethod
    def _said(cls, fields: Any) -> Any:
        return without_neutral(check_object(fields), cls.model_fields)

    @model_validator(mode="after")
    def _shown(self) -> "Request":
        if self.specbound.rounds and not self.stream:
            raise ValueError("specbound.rounds needs stream: true")
        return self


class ChatRequest(Request, Conversation):
    """Body of /v1/chat/completions.

    Attributes:
        response_format: what the answer's text is to be.
        parallel_tool_calls: False tells the first call of an answer alone.
    """

    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat = ResponseFormat(type="text")
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _asked(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.response_format.binding is not None and self.called:
            raise ValueError("response_format and tools bind one answer twice: leave one of them out")
        if (self.ignore_eos or self.min_tokens) and (self.must_call or self.response_format.binding is not None):
            raise ValueError("ignore_eos and min_tokens go on where a bound answer ends: leave them out")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """So many of the likeliest tokens are told beside each one; None tells no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most; None sets no limit."""
        given = self.max_completion_tokens or self.max_tokens
        return None if given == -1 else given

    @property
    def echo(self) -> bool:
        """Whether the answer begins with its prompt: a chat's never does."""
        return False


class CompletionRequest(Request):
    """Body of /v1/completions.

    Attributes:
        prompt: one or several, each as text or as token ids.
        max_tokens: 0 gives only the prompt back.
        echo: the answer begins with its prompt, and `logprobs` tells those of its tokens too.
        add_special_tokens: vLLM's; False takes texts without what the tokenizer puts around them.
    """

    prompt: Annotated[list[str | list[int]], WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: int | None = Field(None, ge=-1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _are_ids(prompt)):
            return [prompt]
        if isinstance(prompt, list) and prompt and all(isinstance(one, str) or _are_ids(one) for one in prompt):
            return prompt
        raise ValueError("must be a text, a list of token ids, or a list of texts or of such lists, and not empty")

    @model_validator(mode="after")
    def _something(self) -> "CompletionRequest":
        if self.limit == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """So many of the likeliest tokens are told beside each one; None tells no probabilities."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Tokens of the answer at most; 16 where none is given, as OpenAI has it; None sets no limit."""
        given = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return 16 if given is None else None if given == -1 else given


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)
