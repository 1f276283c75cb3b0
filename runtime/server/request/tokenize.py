"""Bodies of /tokenize (a text, or messages) and /detokenize (token ids). Knows no model."""

from typing import Any

from pydantic import ConfigDict, Field, model_validator

from runtime.server.request.messages import Conversation, Message
from runtime.server.request.strict import Strict, check_object, describe

# What goes with messages, at the values that say nothing.
UNSAID: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None,),
    "chat_template_kwargs": ({}, None),
    "continue_final_message": (False, None),
    "enable_thinking": (None,),
    "reasoning_effort": (None,),
    "tool_choice": ("auto", None),
    "tools": ([], None),
}


def _describe_either(schema: dict[str, Any]) -> None:
    """Say in the document that there is a prompt, or messages, and what goes with one of them alone."""
    describe(schema)
    text: dict[str, Any] = {name: {"enum": [*values]} for name, values in UNSAID.items()}
    text["prompt"] = {"type": "string"}
    chat = {"messages": {"type": "array"}, "add_special_tokens": {"enum": [False, None]}}
    schema["oneOf"] = [
        {"properties": text, "required": ["prompt"]},
        {"properties": chat, "required": ["messages"]},
    ]


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


class TokenizeRequest(Conversation):
    """Body of /tokenize.

    Attributes:
        add_special_tokens: to a text, as a completion's prompt gets them; a chat template has its own.
    """

    model_config = ConfigDict(json_schema_extra=_describe_either)

    model: str | None = None
    messages: list[Message] = Field(default_factory=list, json_schema_extra={"minItems": 1})
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="before")
    @classmethod
    def _said(cls, fields: Any) -> Any:
        found = check_object(fields)
        if found.get("messages") is None and found.get("prompt") is not None:
            said = [name for name, values in UNSAID.items() if found.get(name) not in values]
            if said:
                raise ValueError(f"{said[0]} goes with messages: leave it out, a prompt is in no chat template")
        return found

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("give either a prompt or messages")
        if self.messages and self.add_special_tokens:
            raise ValueError("add_special_tokens goes with a prompt: leave it out, the chat template adds its own")
        return self
