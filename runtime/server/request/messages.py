"""Messages of a chat in OpenAI's form, and how the chat template is to be asked. Knows no model."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from runtime.server.request.strict import Strict
from runtime.server.request.template import TemplateFields
from runtime.server.request.tools import (
    CHOICE_SCHEMA,
    AllowedTools,
    Call,
    NamedFunction,
    NamedTool,
    Tool,
    name_of,
)

# What clients hold of an answer besides its text, and send back: it says nothing to a template.
BESIDE = ("id", "annotations", "parsed", "phase", "provider_specific_fields")
BESIDE_TEXT = ("annotations", "cache_control", "citations", "id", "index", "logprobs", "parsed", "phase")
# What says nothing where it is empty, and would have to be acted on where it is not.
UNUSED = ("audio", "function_call", "images", "prefix", "reasoning_details", "thinking_blocks")
# What the document says of text, or parts of text.
PART = {
    "type": "object",
    "properties": {name: {} for name in BESIDE_TEXT} | {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": {"type": "null"},
}
CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}]}


def check_part(part: dict[str, Any]) -> None:
    """Whether nothing stands in a part of text that would have to be acted on.

    Raises:
        ValueError: something does.
    """
    for name in [name for name, value in part.items() if value is not None]:
        if name not in ("type", "text", *BESIDE_TEXT):
            raise ValueError(f"{name:.40} of a part of text is not known to this server: leave it out")


class Message(Strict):
    """One message of a chat.

    Attributes:
        content: text; parts of text are joined.
        name: handed to the chat template, of which few have a place for it.
        reasoning_content: the same.
        tool_calls: what the assistant called.
        tool_call_id: of the call that a tool's message answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, WithJsonSchema(CONTENT_SCHEMA)]
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] = Field(default_factory=list)
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_sent_back(cls, fields: Any) -> Any:
        """An answer with everything that its client holds; one without text is its refusal, or empty."""
        if type(fields) is not dict:
            raise ValueError("must be an object with a role and a content")
        kept = {key: value for key, value in fields.items() if value is not None and key not in BESIDE}
        for key in UNUSED:
            if kept.pop(key, None):
                raise ValueError(f"{key} is not supported by this server: leave it out")
        if (reasoning := kept.pop("reasoning", None)) is not None:
            kept.setdefault("reasoning_content", reasoning)
        if kept.get("role") == "assistant":
            kept.setdefault("content", kept.pop("refusal", ""))
        elif kept.get("tool_calls"):
            raise ValueError("tool_calls belongs to messages of the assistant: leave it out")
        elif "content" not in kept:
            raise ValueError("content is missing: give text, or a list of parts of type text")
        return kept

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if not isinstance(content, list):
            if not isinstance(content, str):
                raise ValueError("must be text, or a list of parts of type text")
            return content
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                found = f"a part of type {kind}" if isinstance(kind, str) and kind != "text" else "a part without text"
                raise ValueError(f"{found:.80} is not supported by this server: send parts of type text only")
            check_part(part)
        return "".join(part["text"] for part in content)

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        calls = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        more: dict[str, Any] = {"name": self.name, "reasoning_content": self.reasoning_content}
        more |= {"tool_calls": calls, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": self.content} | {key: value for key, value in more.items() if value}


class Conversation(TemplateFields):
    """What the chat template is asked.

    Attributes:
        tools: functions that the answer may call.
        tool_choice: `none`, `auto`, `required`, the one to be called, or those that may or must.
    """

    messages: list[Message] = Field(json_schema_extra={"minItems": 1})
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | AllowedTools, WithJsonSchema(CHOICE_SCHEMA)
    ] = "auto"

    @field_validator("messages")
    @classmethod
    def _some(cls, messages: list[Message]) -> list[Message]:
        if not messages:
            raise ValueError("must hold at least one message")
        return messages

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, choice: Any) -> Any:
        if isinstance(choice, dict) and choice.get("type") == "function" and (name := name_of(choice)) is not None:
            return NamedTool(type="function", function=NamedFunction(name=name))
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            return AllowedTools.of(choice.get("allowed_tools"))
        if choice not in ("none", "auto", "required"):
            raise ValueError("must be none, auto, required, a function by its name, or allowed_tools")
        return choice

    @model_validator(mode="after")
    def _one_end(self) -> "Conversation":
        if self.continue_final_message and [message.role for message in self.messages[-1:]] != ["assistant"]:
            raise ValueError("continue_final_message needs a last message of the assistant")
        return self

    @model_validator(mode="after")
    def _known_tool(self) -> "Conversation":
        allowed = self.tool_choice.names if isinstance(self.tool_choice, AllowedTools) else set()
        if (self.must_call and not self.called) or allowed - {tool.function.name for tool in self.tools}:
            raise ValueError("tool_choice asks for a call of what is not among the tools")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.mode == "required"
        return self.tool_choice not in ("none", "auto")

    @property
    def called(self) -> list[Tool]:
        """The tools that the answer may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool for tool in self.tools if tool.function.name in self.tool_choice.names]
        return [] if self.tool_choice == "none" else self.tools

    @property
    def tools_of_template(self) -> list[dict[str, Any]]:
        """What the template is told that the model may call: of a choice of one function, all the same all."""
        told = self.called if isinstance(self.tool_choice, AllowedTools) else self.tools
        return [] if self.tool_choice == "none" else [tool.for_template() for tool in told]
