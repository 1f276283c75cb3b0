"""Messages of a chat in OpenAI's form, and how the chat template is to be asked. Knows no model."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from runtime.server.request.strict import Strict
from runtime.server.request.tools import Call, NamedFunction, NamedTool, Tool

# What clients hold of an answer besides its text, and send back: it says nothing to a template.
BESIDE = ("id", "annotations", "provider_specific_fields")
BESIDE_TEXT = ("annotations", "cache_control", "citations", "id", "index", "logprobs", "phase")
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
        for key in ("function_call", "audio"):
            if kept.pop(key, None):
                raise ValueError(f"{key} is not supported by this server: send messages of text only")
        if (reasoning := kept.pop("reasoning", None)) is not None:
            kept.setdefault("reasoning_content", reasoning)
        if kept.get("role") == "assistant":
            kept.setdefault("content", kept.pop("refusal", ""))
        elif kept.get("tool_calls"):
            raise ValueError("tool_calls belongs to messages of the assistant: leave it out")
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


class Conversation(Strict):
    """What the chat template is asked.

    Attributes:
        add_generation_prompt: the template ends where an answer begins; by default, unless a message is continued.
        continue_final_message: the answer goes on with the last message, which is the assistant's.
        chat_template_kwargs: variables of the template.
        enable_thinking: one of them, which some clients send beside.
        tools: functions that the answer may call.
        tool_choice: `none`, `auto`, `required`, or the one to be called.
    """

    messages: list[Message] = Field(json_schema_extra={"minItems": 1})
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    enable_thinking: bool | None = None

    @field_validator("messages")
    @classmethod
    def _some(cls, messages: list[Message]) -> list[Message]:
        if not messages:
            raise ValueError("must hold at least one message")
        return messages

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, choice: Any) -> Any:
        function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return NamedTool(type="function", function=NamedFunction(name=function["name"]))
        if choice not in ("none", "auto", "required"):
            raise ValueError("must be none, auto, required, or a function by its name")
        return choice

    @model_validator(mode="after")
    def _one_end(self) -> "Conversation":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt: true exclude each other: leave one out"
            )
        if self.continue_final_message and [message.role for message in self.messages[-1:]] != ["assistant"]:
            raise ValueError("continue_final_message needs a last message of the assistant")
        return self

    @model_validator(mode="after")
    def _known_tool(self) -> "Conversation":
        if self.must_call and not self.called:
            raise ValueError("tool_choice asks for a call of what is not among the tools")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in ("none", "auto")

    @property
    def called(self) -> list[Tool]:
        """The tools that the answer may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else self.tools

    @property
    def template_options(self) -> dict[str, Any]:
        """Options of `apply_chat_template`, the variables aside."""
        if self.continue_final_message:
            return {"continue_final_message": True, "add_generation_prompt": False}
        return {"add_generation_prompt": self.add_generation_prompt is not False}

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template sees besides the messages."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return self.chat_template_kwargs | thinking

    @property
    def tools_of_template(self) -> list[dict[str, Any]]:
        """What the template is told that the model may call: of a choice of one function, all the same all."""
        return [] if self.tool_choice == "none" else [tool.for_template() for tool in self.tools]
