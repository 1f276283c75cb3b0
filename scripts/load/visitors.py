"""Clients of `identity.py`: they ask one question, read the answer or leave, and compare it. Know no model."""

import http.client
import json
from collections import defaultdict
from typing import Any

from oracle import by_text
from questions import Question, Text

TIMEOUT = 1800.0  # of one request, in seconds
ROUTES = {True: "/v1/chat/completions", False: "/v1/completions"}


def ask(url: str, model: str, question: Question) -> tuple[list[Text], int | None]:
    """Answers to a question, in order; the tokens that the server counts, where it says so."""
    connection = http.client.HTTPConnection(url.rpartition("/")[2], timeout=TIMEOUT)
    try:
        body = json.dumps({"model": model} | question.body)
        connection.request("POST", ROUTES[question.is_chat], body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status}: {response.read().decode()}")
        if question.streams:
            return _streamed(response, question), None
        answer = json.loads(response.read())
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        texts = [Text(_piece(one, "message"), None, one["finish_reason"], _logprobs(one)) for one in choices]
        return texts, answer["usage"]["completion_tokens"]
    finally:
        connection.close()


def _streamed(response: http.client.HTTPResponse, question: Question) -> list[Text]:
    """Answers put together from their pieces, as far as they were read."""
    texts: dict[int, Text] = defaultdict(lambda: Text(ids=[]))
    while line := response.readline():
        if line.startswith(b"data: [DONE]"):
            return [texts[index] for index in sorted(texts)]
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(str(event["error"]))
        (choice,) = event["choices"]
        text = texts[choice["index"]]
        text.text += _piece(choice, "delta")
        text.logprobs += _logprobs(choice)
        text.reason = choice["finish_reason"] or text.reason
        token = event.get("specbound", {}).get("token")
        assert text.ids is not None
        text.ids += [] if token is None else [token]
        if question.leaves_after is not None and len(text.ids) >= question.leaves_after:
            return [text]
    raise ValueError("the stream was cut")


def _piece(choice: dict[str, Any], part: str) -> str:
    """Text of a choice, or of a piece of it."""
    return str((choice[part].get("content") if part in choice else choice.get("text")) or "")


def _logprobs(choice: dict[str, Any]) -> list[tuple[float, dict[str, float]]]:
    """Those of a chat or a completion, in one form."""
    given = choice.get("logprobs")
    if not given:
        return []
    if "content" in given:
        tops = [[(one["token"], one["logprob"]) for one in entry["top_logprobs"]] for entry in given["content"]]
        return [(entry["logprob"], by_text(top)) for entry, top in zip(given["content"], tops, strict=True)]
    return list(zip(given["token_logprobs"], given["top_logprobs"], strict=True))


def differences(question: Question, found: list[Text], tokens: int | None) -> list[str]:
    """In what answers are not those expected, in words; nothing where they are."""
    if len(found) != len(question.expected):
        return [f"{len(found)} answers of {len(question.expected)}"]
    wrong = []
    for one, expected in zip(found, question.expected, strict=True):
        assert expected.ids is not None
        if question.leaves_after is not None:  # what was read of it
            assert one.ids is not None
            expected = Text(
                expected.text[: len(one.text)], expected.ids[: len(one.ids)], one.reason, expected.logprobs
            )
            expected.logprobs = expected.logprobs[: len(one.logprobs)]
        pairs = [("ids", one.ids, expected.ids if one.ids is not None else None), ("text", one.text, expected.text)]
        pairs += [("reason", one.reason, expected.reason), ("logprobs", one.logprobs, expected.logprobs)]
        wrong += [f"{what}: {seen!r}, stock alone {alone!r}" for what, seen, alone in pairs if seen != alone]
    counted = sum(len(each.ids or ()) for each in question.expected)
    if tokens not in (None, counted):
        wrong.append(f"{tokens} tokens counted, {counted} of stock alone")
    return wrong
