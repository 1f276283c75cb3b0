"""Body of /v1/responses, for text. Knows no model.

It asks what a chat asks, in other words: it is answered as that chat.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from runtime.server.errors import ApiError
from runtime.server.request.messages import BESIDE_TEXT, check_part
from runtime.server.request.neutral import describe_body, without_neutral
from runtime.server.request.sampling import Sampling
from runtime.server.request.schema import ChatRequest, Speculation, StreamOptions
from runtime.server.request.strict import Strict, check_object, without_null
from runtime.server.request.template import TemplateFields
from runtime.server.request.tools import NamedSchema

TEXTS = ("input_text", "output_text", "text", "reasoning_text")
# What clients hold of items besides, and send back. What reasoning is hidden in is not to be read here.
BESIDE = ("id", "phase", "status", "type")
BESIDE_REASONING = (*BESIDE, "content", "summary")
# What the document says of text, or a list of messages and of the reasoning that led to them.
TEXT = {"type": "string"}
NULL = {"type": "null"}
PART = {
    "type": "object",
    "properties": {name: {} for name in BESIDE_TEXT} | {"type": {"enum": [*TEXTS]}, "text": TEXT},
    "required": ["type", "text"],
    "additionalProperties": NULL,
}
PARTS = {"type": "array", "items": PART}
MESSAGE = {
    "type": "object",
    "properties": {name: {} for name in BESIDE}
    | {name: {"anyOf": [TEXT, NULL]} for name in ("name", "reasoning_content", "tool_call_id")}
    | {
        "type": {"enum": ["message", None]},
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [TEXT, PARTS]},
    },
    "required": ["role", "content"],
    "additionalProperties": NULL,
}
REASONING = {
    "type": "object",
    "properties": {name: {} for name in BESIDE}
    | {"type": {"const": "reasoning"}, "content": {"anyOf": [TEXT, PARTS, NULL]}, "summary": {"maxItems": 0}},
    "required": ["type"],
    "additionalProperties": NULL,
}
ITEMS = {"type": "array", "items": {"anyOf": [MESSAGE, REASONING]}, "contains": MESSAGE}
INPUT_SCHEMA = {"anyOf": [TEXT, ITEMS]}


class TextFormat(Strict):
    """What the text is to be; a schema stands here without the chats' further level."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("type json_schema needs a schema, and no other type has one")
        return self


class TextOptions(Strict):
    """What the answer's text is to be."""

    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] | None = None


class Quiet(Speculation):
    """As chats have it, but events of responses have no place for rounds."""

    rounds: Annotated[bool, WithJsonSchema({"enum": [False]})] = False

    @field_validator("rounds")
    @classmethod
    def _untold(cls, value: bool) -> bool:
        if value:
            raise ValueError("is not told by this route: leave it out")
        return value


class ResponsesRequest(Sampling, TemplateFields):
    """Body of /v1/responses.

    Attributes:
        input: the user's message, or messages.
        instructions: of the system, before the messages.
        max_output_tokens: of the answer, its reasoning included.
        reasoning: an effort of `none` is the chats' `reasoning_effort`; there is no other.
        metadata, parallel_tool_calls, tool_choice: told in the response, and say nothing else: there are no tools.
        specbound: as chats have it, and so is what is chosen of tokens and said of the template.
    """

    model_config = ConfigDict(json_schema_extra=describe_body)

    model: str
    input: Annotated[list[dict[str, Any]], WithJsonSchema(INPUT_SCHEMA)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    reasoning: dict[str, Any] = Field(default_factory=dict, json_schema_extra={"enum": [{}, {"effort": "none"}]})
    metadata: dict[str, Any] = Field(default_factory=dict)
    parallel_tool_calls: bool = True
    tool_choice: Literal["none", "auto"] = "auto"
    text: TextOptions = TextOptions()
    specbound: Quiet = Quiet()

    @model_validator(mode="before")
    @classmethod
    def _said(cls, fields: Any) -> Any:
        return without_neutral(check_object(fields), cls.model_fields)

    @field_validator("reasoning", mode="before")
    @classmethod
    def _effort(cls, reasoning: Any) -> Any:
        found = without_null(reasoning)
        if found not in ({}, {"effort": "none"}):
            said = "reasoning is not supported by this server but for an effort of none: leave it out"
            raise ApiError(400, said, param="reasoning")
        return found

    @field_validator("input", mode="before")
    @classmethod
    def _messages(cls, given: Any) -> Any:
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        if not isinstance(items, list) or not all(isinstance(one, dict) for one in items):
            raise ValueError("must be a text, or a list of messages")
        messages: list[dict[str, Any]] = []
        reasoning = ""
        for item in map(without_null, items):
            kind, content = item.get("type"), item.get("content")
            if kind == "reasoning":  # it goes back to the message that it led to
                _check_reasoning(item)
                reasoning += "" if content is None else _text(content)
            elif kind in ("message", None):
                said = {name: value for name, value in item.items() if name not in BESIDE}
                before = {"reasoning_content": reasoning} if reasoning else {}
                messages.append(said | {"content": _text(content)} | before)
                reasoning = ""
            else:
                raise ValueError(f"an item of type {kind!s:.40} is not supported by this server: send text")
        if not messages:
            raise ValueError("must hold at least one message")
        return messages

    def as_chat(self) -> ChatRequest:
        """The chat that asks the same.

        Raises:
            ValidationError: a value is out of its range.
        """
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        own = {"input", "instructions", "max_output_tokens", "text", "reasoning", "metadata", "stream_options"}
        own |= {"parallel_tool_calls", "tool_choice"}
        effort = self.reasoning.get("effort", self.reasoning_effort)
        same = self.model_dump(exclude=own, exclude_none=True)
        return ChatRequest.model_validate(
            same
            | {"messages": [*system, *self.input], "max_completion_tokens": self.max_output_tokens}
            | {"response_format": self._format(), "reasoning_effort": effort}
        )

    def _format(self) -> dict[str, Any]:
        """As chats have it."""
        asked = self.text.format
        if asked.schema_ is None:
            return {"type": asked.type}
        schema = NamedSchema(name=asked.name, schema=asked.schema_).model_dump(by_alias=True, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}

    def echoed(self) -> dict[str, Any]:
        """What a response tells of its request."""
        text = self.text.model_dump(by_alias=True, exclude_none=True)
        kept = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata", "parallel_tool_calls")
        return {name: getattr(self, name) for name in (*kept, "tool_choice")} | {"text": text}


def _check_reasoning(item: dict[str, Any]) -> None:
    """Whether all of the reasoning is there as text.

    Raises:
        ValueError: it is not.
    """
    wrong = [name for name in item if name not in BESIDE_REASONING]
    wrong += ["summary"] if item.get("summary") else []
    if wrong:
        raise ValueError(f"{wrong[0]:.40} of an item of reasoning is not supported by this server: leave it out")


def _text(content: Any) -> str:
    """Text of a message's parts.

    Raises:
        ValueError: there are others.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("a message's content must be text, or a list of parts of text")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXTS or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type {kind!s:.40} is not supported by this server: send parts of text only")
        check_part(part)
    return "".join(part["text"] for part in content)
