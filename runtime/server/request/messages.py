"""Messages of a chat in OpenAI's form, and how the chat template is to be asked. Knows no model."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """No unknown fields, and no text where a number is asked for; null is as if nothing were said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, fields: Any) -> Any:
        return {key: value for key, value in fields.items() if value is not None} if type(fields) is dict else fields


# What clients hold of an answer besides its text, and send back: it says nothing to a template.
BESIDE = ("id", "annotations", "provider_specific_fields")


class Message(Strict):
    """One message of a chat.

    Attributes:
        content: text; parts of text are joined.
        name: handed to the chat template, of which few have a place for it.
        reasoning_content: the same.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_sent_back(cls, fields: Any) -> Any:
        """An answer with everything that its client holds; one without text is its refusal, or empty."""
        if type(fields) is not dict:
            raise ValueError("must be an object with a role and a content")
        kept = {key: value for key, value in fields.items() if value is not None and key not in BESIDE}
        for key in ("tool_calls", "function_call", "audio"):
            if kept.pop(key, None):
                raise ValueError(f"{key} is not supported by this server: send messages of text only")
        if (reasoning := kept.pop("reasoning", None)) is not None:
            kept.setdefault("reasoning_content", reasoning)
        if kept.get("role") == "assistant":
            kept.setdefault("content", kept.pop("refusal", ""))
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
        return "".join(part["text"] for part in content)

    def for_template(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        more = {"name": self.name, "reasoning_content": self.reasoning_content}
        return {"role": role, "content": self.content} | {key: value for key, value in more.items() if value}


class Conversation(Strict):
    """What the chat template is asked.

    Attributes:
        add_generation_prompt: the template ends where an answer begins; by default, unless a message is continued.
        continue_final_message: the answer goes on with the last message, which is the assistant's.
        chat_template_kwargs: variables of the template.
        enable_thinking: one of them, which some clients send beside.
    """

    messages: list[Message]
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

    @model_validator(mode="after")
    def _one_end(self) -> "Conversation":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt: true exclude each other: leave one out"
            )
        if self.continue_final_message and [message.role for message in self.messages[-1:]] != ["assistant"]:
            raise ValueError("continue_final_message needs a last message of the assistant")
        return self

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
