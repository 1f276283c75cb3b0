"""`Reader`: an answer's text, as it comes, split into content, reasoning and calls of tools. Knows no requests."""

import json
import uuid
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

from runtime.server.dialect import THINK, Dialect

# As response templates name it.
REASONING = ("reasoning_content", "reasoning", "thinking")
# What a parser raises on a text that is not of its form, or JSON that is nested too deep.
UNREADABLE = (ValueError, KeyError, RecursionError)

# A part of a message as a chat's stream has it.
Delta = dict[str, Any]


class Reader:
    """Takes the pieces of one answer.

    Args:
        dialect: how the model writes.
        opening: what of the answer its prompt holds already.
        tools: those that may be called, as chat templates take them; without any nothing is a call.
        single: only the first call is told.

    Attributes:
        content, reasoning: the text of each so far.
        calls: the calls so far, in OpenAI's form.
        thinking: whether reasoning is being written.
    """

    def __init__(
        self, dialect: Dialect, opening: str = "", tools: list[dict[str, Any]] | None = None, *, single: bool = False
    ) -> None:
        self.content, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.single = single
        self.thinking = dialect.thinks and dialect.own is None and opening.rfind(THINK[0]) > opening.rfind(THINK[1])
        form = dialect.calls if dialect.own is None else None
        self._marks = (form.begin, form.end) if form else ("", "")
        self._body = ""  # of the call that is being written
        template = dialect.template(calls=bool(tools))
        told: Any = tools
        self._parser: Any = None if template is None else ResponseParser(template, prefix=opening, tools=told)
        self._look([] if self._parser is None else self._parser.initial_events)

    def feed(self, text: str) -> list[Delta]:
        """What the next piece of text adds; nothing while it may be a part of a mark."""
        if self._parser is None:
            return self._say(text)
        try:
            return self._deltas(self._parser.feed(text))
        except UNREADABLE:  # a template of the tokenizer that does not fit: the rest is text
            self._parser, self.thinking = None, False
            return self._say(self._opened() + text)

    def finish(self) -> list[Delta]:
        """What was held back, when no more text comes."""
        if self._parser is None:
            return []
        self._marks = (self._marks[0], "")  # what is open now was not ended
        try:
            return self._deltas(self._parser.finalize()[1])
        except UNREADABLE:
            return self._say(self._opened())

    def _deltas(self, events: list[dict[str, Any]]) -> list[Delta]:
        """Of the parser's events."""
        self._look(events)
        found: list[Delta] = []
        for event in events:
            kind, field = event["type"], event["field"]
            if field == "tool_calls":
                self._body = self._body + event["text"] if kind == "region_chunk" else self._body
                found += self._end_call(event["value"]) if kind == "region_close" else []
            elif kind == "region_chunk" and field == "content":
                found += self._say(event["text"])
            elif kind == "region_chunk" and field in REASONING:
                self.reasoning += event["text"]
                found.append({"reasoning_content": event["text"]})
        return found

    def _look(self, events: list[dict[str, Any]]) -> None:
        """Whether reasoning is open after these events."""
        for event in events:
            if event["field"] in REASONING and event["type"] != "region_chunk":
                self.thinking = event["type"] == "region_open"

    def _opened(self) -> str:
        """The call that is being written, as text."""
        return self._marks[0] + self._body if self._body else ""

    def _say(self, text: str) -> list[Delta]:
        if not text or (self.calls and text.isspace()):  # lines between calls
            return []
        self.content += text
        return [{"content": text}]

    def _end_call(self, value: Any) -> list[Delta]:
        """Of a call that is complete, or text where it is none."""
        body, self._body = self._body, ""
        made = [_call(each) for each in (value if isinstance(value, list) else [value])]
        calls = [call for call in made if call is not None]
        if not made or len(calls) < len(made):
            return self._say(self._marks[0] + body + self._marks[1])
        found: list[Delta] = []
        for call in calls[: 1 - len(self.calls)] if self.single else calls:
            found.append({"tool_calls": [{"index": len(self.calls)} | call]})
            self.calls.append(call)
        return found


def _call(value: Any) -> dict[str, Any] | None:
    """A call in OpenAI's form, of what a model has written; None where it is none."""
    function = value.get("function", value) if isinstance(value, dict) else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    about = {"name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    # Templates of Mistral take ids of nine letters and digits alone.
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": about}
