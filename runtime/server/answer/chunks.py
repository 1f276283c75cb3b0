"""`Chunks`: the form of chats and completions, whole or in chunks. Knows no worker."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from runtime.server.answer.choice import Choice
from runtime.server.answer.reader import Delta
from runtime.server.request.schema import ChatRequest, CompletionRequest


class Chunks:
    """Of one request.

    Args:
        model_id: the name the model is served under.
    """

    last = "data: [DONE]\n\n"

    def __init__(self, body: ChatRequest | CompletionRequest, model_id: str) -> None:
        self.is_chat = isinstance(body, ChatRequest)
        self.about = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model_id,
        }
        options = body.stream_options
        self.usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        self.counts = bool(self.usage and options and options.continuous_usage_stats)

    def line(self, event: dict[str, Any]) -> str:
        """An event of a stream, as it is sent."""
        return f"data: {json.dumps(event)}\n\n"

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The response, when all of it is there."""
        return self._envelope([self._whole(choice) for choice in choices], chunk=False) | {"usage": usage}

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """What a stream has of a choice before its first token."""
        if self.is_chat:
            return [self._chunk(choice, {"role": "assistant", "content": ""})]
        return [self._chunk(choice, {"content": choice.echo})] if choice.echo else []

    def part(self, choice: Choice, deltas: Sequence[Delta], about: dict[str, Any]) -> list[dict[str, Any]]:
        """What is new of a choice.

        Args:
            about: fields of our own, which stand beside it; with any, there is a chunk also where nothing is new.
        """
        found = [self._chunk(choice, delta) for delta in deltas]
        if about:
            found = found or [self._chunk(choice, {"content": ""} if "token" in about.get("specbound", ()) else {})]
            found[0] |= about
        return found

    def closing(self, choice: Choice) -> list[dict[str, Any]]:
        """The end of a choice."""
        return [self._chunk(choice, {}, choice.finish_reason)]

    def end(self, choices: Sequence[Choice], usage: dict[str, Any]) -> list[dict[str, Any]]:
        """The end of all."""
        return [self._envelope([], chunk=True) | {"usage": usage}] if self.usage else []

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """What goes wrong when the status is sent already."""
        return error

    def _envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.is_chat else "text_completion"
        return {"object": kind, "choices": choices} | self.about

    def _whole(self, choice: Choice) -> dict[str, Any]:
        about = {"index": choice.index, "logprobs": choice.form.take(), "finish_reason": choice.finish_reason}
        reader = choice.reader
        if not self.is_chat:
            return about | {"text": choice.echo + reader.content}
        content = reader.content or (None if reader.calls else "")
        more = {"reasoning_content": reader.reasoning, "tool_calls": reader.calls}
        message = {"role": "assistant", "content": content} | {key: value for key, value in more.items() if value}
        return about | {"message": message}

    def _chunk(self, choice: Choice, delta: Delta, finish_reason: str | None = None) -> dict[str, Any]:
        body = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        about = {"index": choice.index, "logprobs": choice.form.take(), "finish_reason": finish_reason}
        return self._envelope([about | body], chunk=True) | (self._so_far(choice) if self.counts else self.usage)

    def _so_far(self, choice: Choice) -> dict[str, Any]:
        prompt, answer = choice.prompt.num_tokens, choice.num_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return {"usage": counts}
