"""From messages to token ids: the one place that does it."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from runtime.errors import DataError


def encode(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, ready to be answered.

    Args:
        messages: each a `role` and a `content`.
        template: through the tokenizer's chat template, where it has one. Otherwise the texts stand one after another,
            with an empty line between.
        options: of `apply_chat_template`, and variables of the template.

    Raises:
        DataError: the template refuses them.
    """
    if not template or not tokenizer.chat_template:
        ids: list[int] = tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        return ids
    try:
        asked = {"add_generation_prompt": True} | dict(options or {})
        ids = tokenizer.apply_chat_template(list(messages), return_dict=True, **asked)["input_ids"]
        return ids
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses the messages, of which the last begins {messages[-1]['content'][:60]!a}:"
            f" {error}"
        ) from error
