"""What cannot be kept is refused, wherever it stands: half characters, what is no number, fields of no effect."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.server.request.limits import Limits
from tests.helpers.servers import MODEL_ID, TEMPLATE, Served, held

HALF = "\ud800"
TEXT: dict[str, Any] = {"model": MODEL_ID, "prompt": "w1", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": MODEL_ID, "messages": [{"role": "user", "content": "w1"}], "max_tokens": 2}
ASKED: dict[str, Any] = {"model": MODEL_ID, "input": "w1", "max_output_tokens": 2}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with held(make_model(), tokenizer, Limits()) as found:
        yield found


def parts(**fields: Any) -> list[dict[str, Any]]:
    """A message of the user whose one part has these fields."""
    return [{"role": "user", "content": [{"type": "text", "text": "w1"} | fields]}]


def named(**fields: Any) -> dict[str, Any]:
    """A format of responses."""
    return {"text": {"format": {"type": "json_schema", "schema": {}} | fields}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", TEXT | {"prompt": HALF}),
        ("/v1/completions", TEXT | {"prompt": ["w1", HALF]}),
        ("/v1/completions", TEXT | {"stop": [HALF]}),
        ("/v1/completions", TEXT | {"metadata": {"a": [{HALF: 1}]}}),
        ("/v1/chat/completions", CHAT | {"messages": parts(text=HALF)}),
        ("/v1/chat/completions", CHAT | {"messages": parts(type=HALF)}),
        ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"a": HALF}}),
        ("/v1/responses", ASKED | {"input": parts(type=HALF)}),
        ("/v1/responses", ASKED | {"input": [{"type": HALF, "content": "w1"}]}),
        ("/v1/responses", ASKED | named(name=HALF)),
        ("/v1/responses", ASKED | named(name="a", description=HALF)),
        ("/tokenize", {"prompt": HALF}),
        ("/tokenize", {"messages": parts(text=HALF)}),
    ],
)
def test_half_a_character_is_refused(served: Served, path: str, body: Any) -> None:
    """JSON can write it, and no tokenizer and no answer can."""
    status, answer = served.post(json.dumps(body).encode(), path)
    assert status == 400 and "half of a surrogate pair" in answer["error"]["message"]


def test_whole_characters_are_taken(served: Served) -> None:
    """Also where JSON writes them as the two halves."""
    body = json.dumps(TEXT | {"stop": "\U0001f600"})
    assert "\\ud83d\\ude00" in body and served.post(body.encode())[0] == 200


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", TEXT | {"metadata": {"a": [5.5]}}),
        ("/v1/completions", TEXT | {"logit_bias": {"5": 5.5}}),
        ("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"a": 5.5}}),
        ("/v1/responses", ASKED | {"chat_template_kwargs": {"a": 5.5}}),
        ("/v1/responses", ASKED | named(name="a", schema={"default": 5.5})),
    ],
)
def test_what_is_no_number_is_refused(served: Served, number: str, path: str, body: Any) -> None:
    status, answer = served.post(json.dumps(body).replace("5.5", number).encode(), path)
    assert status == 400 and "must be a finite number" in answer["error"]["message"]


def test_arguments_of_calls_are_looked_at_too(served: Served) -> None:
    """They are JSON within JSON."""
    for arguments, said in (('{"a": NaN}', "finite number"), ('{"a": "\\ud800"}', "surrogate pair")):
        call = CALL | {"function": {"name": "f", "arguments": arguments}}
        body = CHAT | {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]}
        status, answer = served.post(json.dumps(body).encode(), "/v1/chat/completions")
        assert status == 400 and said in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/completions", TEXT | {"specbound": {"rounds": True}}, "specbound.rounds needs stream: true"),
        ("/v1/completions", TEXT | {"logit_bias": {"1": 5, "01": 7}}, "logit_bias: must give token ids"),
        (
            "/v1/chat/completions",
            CHAT | {"messages": parts(image_url="a")},
            "image_url of a part of text is not known",
        ),
        ("/v1/responses", ASKED | {"stream": True, "specbound": {"rounds": True}}, "specbound.rounds: is not told by"),
        ("/v1/responses", ASKED | {"specbound": {"rounds": 0}}, "specbound.rounds: must be true or false"),
        ("/v1/responses", ASKED | {"input": parts(image_url="a")}, "input: image_url of a part of text is not known"),
        ("/v1/responses", ASKED | {"input": [{"role": "user", "content": "w1", "colour": 1}]}, "messages.0.colour"),
        (
            "/v1/responses",
            ASKED | {"input": [{"type": "reasoning", "encrypted_content": "a"}, *parts()]},
            "encrypted_content of an item of reasoning is not supported",
        ),
        (
            "/v1/responses",
            ASKED | {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]}, *parts()]},
            "summary of an item of reasoning is not supported",
        ),
        *(
            ("/tokenize", {"prompt": "w1"} | fields, f"{next(iter(fields))} goes with messages")
            for fields in (
                {"tools": [{"type": "function", "function": {"name": "f"}}]},
                {"tool_choice": "none"},
                {"enable_thinking": False},
                {"add_generation_prompt": True},
                {"continue_final_message": True},
                {"chat_template_kwargs": {"a": 1}},
            )
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(served: Served, path: str, body: Any, said: str) -> None:
    status, answer = served.post(json.dumps(body).encode(), path)
    assert status == 400 and said in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", ASKED | {"reasoning": {"effort": None, "summary": None}}),
        ("/v1/responses", ASKED | {"specbound": {"rounds": False}}),
        ("/v1/responses", ASKED | {"input": [{"type": "reasoning", "summary": [], "id": "r"}, *parts(logprobs=[])]}),
        ("/v1/responses", ASKED | {"input": [{"role": "user", "content": "w1", "id": "m", "colour": None}]}),
        ("/v1/chat/completions", CHAT | {"messages": parts(cache_control={"type": "ephemeral"}, colour=None)}),
        ("/tokenize", {"prompt": "w1", "tools": [], "tool_choice": "auto", "enable_thinking": None}),
    ],
)
def test_what_says_nothing_is_taken(served: Served, path: str, body: Any) -> None:
    assert served.post(json.dumps(body).encode(), path)[0] == 200


def test_calls_that_a_template_does_not_tell_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model would not see them; a template that does tell them gets them."""
    turns = [*CHAT["messages"], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "w2"}]
    status, answer = served.post(json.dumps(CHAT | {"messages": turns}).encode(), "/v1/chat/completions")
    assert status == 400 and "no place for tool_calls" in answer["error"]["message"]
    told = "{% for message in messages %}{{ message.content }} {{ message.tool_calls }} {% endfor %}"
    monkeypatch.setattr(served.worker.tokenizer, "chat_template", told)
    assert served.post(json.dumps(CHAT | {"messages": turns}).encode(), "/v1/chat/completions")[0] == 200
    needed = "{% for each in messages %}{{ each.content }}{{ each.tool_calls[0].id if loop.index == 2 }}{% endfor %}"
    monkeypatch.setattr(served.worker.tokenizer, "chat_template", needed)
    assert served.post(json.dumps(CHAT | {"messages": turns}).encode(), "/v1/chat/completions")[0] == 200
