"""/v1/responses as the real client asks it, and reasoning that is told apart from the text."""

from typing import Any

import openai
import pytest

from tests.helpers.servers import MODEL_ID, stock

MESSAGES: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
ASKED: dict[str, Any] = {"model": MODEL_ID, "input": "Who?", "instructions": "Be short.", "max_output_tokens": 20}
THINKING = (
    "{% for message in messages %}{{ message.reasoning_content or '' }}{{ message.content }}{% endfor %}"
    "{% if enable_thinking is not false %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)


def text_of(served: Any, messages: Any = MESSAGES, **options: Any) -> str:
    """Stock's answer of 20 tokens."""
    tokenizer = served[2]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)["input_ids"]
    found = stock(served, ids, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(found, skip_special_tokens=True))


def test_a_response(served: Any, client: openai.OpenAI) -> None:
    """Of a text, and of messages, is the chat's text; usage has its other names."""
    expected = text_of(served)
    found = client.responses.create(temperature=0, **ASKED)
    assert found.output_text == expected and found.status == "incomplete"
    assert found.incomplete_details is not None and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None and found.usage.output_tokens == 20
    assert found.usage.total_tokens == found.usage.input_tokens + 20
    assert found.instructions == "Be short." and found.model == MODEL_ID and found.id.startswith("resp_")
    parts: Any = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Who?"}]},
    ]
    same = client.responses.create(model=MODEL_ID, input=parts, temperature=0, max_output_tokens=20, store=False)
    assert same.output_text == expected
    last: Any = {"type": None, "role": "user", "content": "Why?"}  # null is as if nothing were said
    again: Any = [*MESSAGES, *found.output, last]  # as the client holds them
    turns = [*MESSAGES, {"role": "assistant", "content": expected}, {"role": "user", "content": "Why?"}]
    next_one = client.responses.create(model=MODEL_ID, input=again, temperature=0, max_output_tokens=20)
    assert next_one.output_text == text_of(served, turns)


def test_a_streamed_response(served: Any, client: openai.OpenAI) -> None:
    """Its events are numbered, in OpenAI's order, and the client puts the same response together."""
    expected = text_of(served)
    events: Any = list(client.responses.create(temperature=0, stream=True, **ASKED))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"} and len(kinds) > 12
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events[4:-4]) == expected == events[-4].text
    assert events[-1].response.output_text == expected
    with client.responses.stream(temperature=0, **ASKED) as stream:
        assert sum(event.type == "response.output_text.delta" for event in stream) == len(events) - 8


def test_a_bound_response(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {"enum": ["cat", "dog"]}
    format: Any = {"format": {"type": "json_schema", "name": "pet", "schema": schema, "strict": True}}
    found = client.responses.create(model=MODEL_ID, input="Who?", temperature=0, max_output_tokens=60, text=format)
    assert found.output_text.strip() in ('"cat"', '"dog"') and found.status == "completed"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools is not supported"),
        ({"background": True}, "background is not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning is not supported by this server but for"),
        ({"truncation": "auto"}, "truncation is not supported by this server: leave it out, and send fewer messages"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "an item of type function_call",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "type input_image"),
        ({"input": []}, "input: must hold at least one message"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input: a message's content must be text"),
        ({"input": [{"role": "king", "content": "a"}]}, "messages.1.role"),
        ({"temperature": 9}, "temperature"),
        ({"extra_body": {"n": 2}}, "n is not supported"),
        ({"extra_body": {"colour": "red"}}, "colour: this server does not know this field"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "needs a schema"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.responses.create(**ASKED | fields)
    assert caught.value.type == "invalid_request_error"


def test_reasoning_is_told_apart(served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the template begins it, a text that never ends it is all reasoning; where it ends it, none is."""
    monkeypatch.setattr(served[2], "chat_template", THINKING)
    arguments: Any = {"model": MODEL_ID, "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    thought = text_of(served).lstrip()
    message: Any = client.chat.completions.create(**arguments).choices[0].message
    assert message.content == "" and message.reasoning_content == thought
    stream: Any = client.chat.completions.create(stream=True, **arguments)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == thought
    assert not any(delta.content for delta in deltas)
    silent: Any = client.chat.completions.create(extra_body={"enable_thinking": False}, **arguments)
    assert silent.choices[0].message.content == text_of(served, enable_thinking=False)
    assert not hasattr(silent.choices[0].message, "reasoning_content")


def test_a_response_with_reasoning(served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an item of its own before the message, and goes back with the message that follows it."""
    monkeypatch.setattr(served[2], "chat_template", THINKING)
    thought = text_of(served).lstrip()
    found = client.responses.create(temperature=0, **ASKED)
    assert [item.type for item in found.output] == ["reasoning", "message"] and found.output_text == ""
    item: Any = found.output[0]
    assert item.content[0].text == thought
    events: Any = list(client.responses.create(temperature=0, stream=True, **ASKED))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == thought
    assert [item.type for item in events[-1].response.output] == ["reasoning", "message"]
    again: Any = [*MESSAGES, *found.output]
    turns = [*MESSAGES, {"role": "assistant", "content": "", "reasoning_content": thought}]
    same = client.responses.create(model=MODEL_ID, input=again, temperature=0, max_output_tokens=20)
    answer: Any = same.output[0]
    assert answer.content[0].text == text_of(served, turns).lstrip()
