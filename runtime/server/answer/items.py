"""`Items`: the form of OpenAI's responses, whole or as events: items of reasoning and messages. Knows no worker."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from runtime.server.answer.choice import Choice
from runtime.server.answer.reader import Delta
from runtime.server.request.responses import ResponsesRequest

Event = dict[str, Any]


class Items:
    """Of one request, which has one choice.

    Args:
        model_id: the name the model is served under.
    """

    last = ""

    def __init__(self, body: ResponsesRequest, model_id: str) -> None:
        self.response = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model_id,
            "error": None, "incomplete_details": None, "tools": [],
            "store": False, "previous_response_id": None, "usage": None, "truncation": "disabled", "top_logprobs": 0,
        } | body.echoed()  # fmt: skip
        self.output: list[dict[str, Any]] = []  # items that are begun; the last may be open
        self.open: str | None = None  # the kind of that
        self.text = ""  # of it
        self.number = -1

    def line(self, event: Event) -> str:
        """An event of a stream, as it is sent."""
        return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The response, when all of it is there."""
        reader = choices[0].reader
        for kind, text in (("reasoning", reader.reasoning), ("message", reader.content)):
            if text or kind == "message":
                self.part(choices[0], [{"content" if kind == "message" else "reasoning_content": text}], {})
        self.closing(choices[0])
        return self._done(choices[0], usage)

    def opening(self, choice: Choice) -> list[Event]:
        """What a stream has before its first token."""
        begun = self.response | {"status": "in_progress", "output": []}
        return [self._event(f"response.{name}", response=begun) for name in ("created", "in_progress")]

    def part(self, choice: Choice, deltas: Sequence[Delta], about: dict[str, Any]) -> list[Event]:
        """What is new."""
        found = []
        for delta in deltas:
            ((field, text),) = delta.items()
            kind = "message" if field == "content" else "reasoning"
            if self.open != kind:
                found += self._close("completed") + self._begin(kind)
            self.text += text
            name = "output_text" if kind == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
            found.append(self._event(f"response.{name}.delta", **self._place(), content_index=0, delta=text, **more))
        return found

    def closing(self, choice: Choice) -> list[Event]:
        """The end of the message; there is one also where the answer is empty."""
        found = [] if any(item["type"] == "message" for item in self.output) else self._begin("message")
        return found + self._close("completed" if choice.finish_reason == "stop" else "incomplete")

    def end(self, choices: Sequence[Choice], usage: dict[str, Any]) -> list[Event]:
        """The end of all."""
        response = self._done(choices[0], usage)
        return [self._event(f"response.{response['status']}", response=response)]

    def failure(self, error: dict[str, Any]) -> Event:
        """What goes wrong when the status is sent already."""
        about = error["error"]
        return self._event("error", code=about["code"], message=about["message"], param=about["param"])

    def _done(self, choice: Choice, usage: dict[str, Any]) -> dict[str, Any]:
        """The response at its end."""
        counts = {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"], "specbound": usage["specbound"],
        }  # fmt: skip
        reason = choice.finish_reason
        why = {"incomplete_details": {"reason": "max_output_tokens"}} if reason == "length" else {}
        status = "completed" if reason == "stop" else "incomplete"
        return self.response | {"status": status, "output": self.output, "usage": counts} | why

    def _begin(self, kind: str) -> list[Event]:
        """A new item of a kind."""
        self.open, self.text = kind, ""
        item: dict[str, Any] = {"id": f"{'msg' if kind == 'message' else 'rs'}_{uuid.uuid4().hex}", "type": kind}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self.output.append(item | {"status": "in_progress"})
        place = self._place()
        return [
            self._event("response.output_item.added", output_index=place["output_index"], item=self.output[-1]),
            self._event("response.content_part.added", **place, content_index=0, part=self._part()),
        ]

    def _close(self, status: str) -> list[Event]:
        """End the open item."""
        if self.open is None:
            return []
        place, part = self._place(), self._part()
        name = "output_text" if self.open == "message" else "reasoning_text"
        about: dict[str, Any] = {"logprobs": []} if self.open == "message" else {}
        self.output[-1] = self.output[-1] | {"content": [part], "status": status}
        self.open = None
        return [
            self._event(f"response.{name}.done", **place, content_index=0, text=self.text, **about),
            self._event("response.content_part.done", **place, content_index=0, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=self.output[-1]),
        ]

    def _part(self) -> dict[str, Any]:
        """The open item's one part."""
        if self.open == "message":
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"type": "reasoning_text", "text": self.text}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _event(self, kind: str, **fields: Any) -> Event:
        self.number += 1
        return {"type": kind, "sequence_number": self.number} | fields
