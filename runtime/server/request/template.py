"""`TemplateFields`: what chats and responses may say of the chat template. Knows no messages and no model."""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from runtime.server.errors import ApiError
from runtime.server.request.strict import Strict


class TemplateFields(Strict):
    """Beside the messages.

    Attributes:
        add_generation_prompt: the template ends where an answer begins; by default, unless a message is continued.
        continue_final_message: the answer goes on with the last message, which is the assistant's.
        chat_template_kwargs: variables of the template.
        enable_thinking: one of them, which some clients send beside.
        reasoning_effort: `none` is `enable_thinking: false`; a model that does not think has no other.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    enable_thinking: bool | None = None
    reasoning_effort: Annotated[str | None, WithJsonSchema({"enum": ["none", None]})] = None

    @field_validator("reasoning_effort", mode="before")
    @classmethod
    def _none(cls, effort: Any) -> Any:
        if effort not in (None, "none"):
            said = "reasoning_effort is not supported by this server but for none: leave it out"
            raise ApiError(400, said, param="reasoning_effort")
        return effort

    @model_validator(mode="after")
    def _one_said(self) -> "TemplateFields":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt: true exclude each other: leave one out"
            )
        if self.reasoning_effort and self.template_variables.get("enable_thinking") is not False:
            raise ValueError("reasoning_effort: none and enable_thinking: true exclude each other: leave one out")
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
        silent = {"enable_thinking": False} if self.reasoning_effort else {}
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return silent | self.chat_template_kwargs | thinking
