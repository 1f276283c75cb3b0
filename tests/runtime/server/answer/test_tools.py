"""Tools: what the template is told, calls that are asked for, conversations with calls, and what is refused."""

import json
import urllib.request
from typing import Any

import openai
import pytest
from transformers import LogitsProcessorList

from runtime.server.dialect import Dialect
from runtime.server.grammar import GrammarMask, grammar_of
from runtime.server.request.schema import ChatRequest
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.servers import MODEL_ID, stock

pytest.importorskip("llguidance")

MESSAGES: Any = [{"role": "user", "content": "Cat or dog?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"$ref": "#/$defs/kind"}},
    "required": ["kind"],
    "additionalProperties": False,
    "$defs": {"kind": {"enum": ["cat", "dog"]}},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "choose", "description": "Choose.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop_it"}},
]
NAMED: Any = {"type": "function", "function": {"name": "choose"}}
ONE: dict[str, Any] = {"model": MODEL_ID, "max_tokens": 300, "temperature": 0, "tools": TOOLS}


def prompt_ids(tokenizer: Any, messages: Any = MESSAGES, **options: Any) -> list[int]:
    """Of a conversation, as transformers makes them."""
    options = {"add_generation_prompt": True, "return_dict": True} | options
    ids: list[int] = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    return ids


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_call_that_is_asked_for(served: Any, client: openai.OpenAI, heads: FakeHeads, choice: Any) -> None:
    """It is what stock writes with the same mask after the template's prompt, streamed and whole."""
    _, model, tokenizer = served
    fields = {"messages": MESSAGES, "tool_choice": choice, "parallel_tool_calls": False}
    ids = prompt_ids(tokenizer, tools=TOOLS)
    body = ChatRequest.model_validate(ONE | fields)
    grammar = grammar_of(model, tokenizer, body, Dialect.of(tokenizer, tools=True), "")
    assert grammar is not None
    mask = LogitsProcessorList([GrammarMask(grammar, len(ids))])
    expected = stock(served, ids, max_new_tokens=300, do_sample=False, logits_processor=mask)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    written = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    heads.truth = ids + expected

    whole = client.chat.completions.create(**ONE, **fields)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls" and message.content is None and message.tool_calls
    (call,) = message.tool_calls
    assert call.type == "function" and call.function.name == written["name"]
    assert json.loads(call.function.arguments) == written["arguments"]
    usage: Any = whole.usage
    assert sum(usage.specbound["accepted"].values()) > 5 and usage.completion_tokens == len(expected)
    if choice is NAMED:
        assert written["name"] == "choose" and written["arguments"]["kind"] in ("cat", "dog")

    chunks = list(client.chat.completions.create(stream=True, **ONE, **fields))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [(delta.index, delta.type) for delta in deltas] == [(0, "function")]
    assert deltas[0].function is not None and deltas[0].function.name == written["name"]
    assert json.loads(str(deltas[0].function.arguments)) == written["arguments"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_that_need_not_be_called(served: Any, client: openai.OpenAI, choice: Any) -> None:
    """The template is told of them, or not, and the text is stock's."""
    tokenizer = served[2]
    ids = prompt_ids(tokenizer, **({"tools": TOOLS} if choice == "auto" else {}))
    expected = stock(served, ids, max_new_tokens=20, do_sample=False)
    found = client.chat.completions.create(**ONE | {"max_tokens": 20}, messages=MESSAGES, tool_choice=choice)
    assert found.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert found.choices[0].message.tool_calls is None and found.choices[0].finish_reason == "length"
    assert prompt_ids(tokenizer, tools=TOOLS) != prompt_ids(tokenizer)
    body = json.dumps({"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice}).encode()
    request = urllib.request.Request(f"{served[0]}/tokenize", body, {"Content-Type": "application/json"})
    assert json.loads(urllib.request.urlopen(request).read())["tokens"] == ids


def test_a_conversation_with_calls(served: Any, client: openai.OpenAI) -> None:
    """An answer as its client holds it, and the tool's, go back into the template with arguments as objects."""
    tokenizer = served[2]
    first = client.chat.completions.create(**ONE, messages=MESSAGES, tool_choice=NAMED)
    message = first.choices[0].message
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "meow"}
    again: Any = [*MESSAGES, message, result]
    found = client.chat.completions.create(**ONE | {"max_tokens": 10}, messages=again)
    plain = {"id": call.id, "type": "function"}
    plain["function"] = {"name": "choose", "arguments": json.loads(call.function.arguments)}
    turns = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [plain]}, result]
    ids = prompt_ids(tokenizer, turns, tools=TOOLS)
    assert '<tool_call>{"name": "choose"' in tokenizer.decode(ids)
    expected = stock(served, ids, max_new_tokens=10, do_sample=False)
    assert found.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)


def called(**fields: Any) -> Any:
    """A conversation in which the assistant has called something."""
    call = {"id": "a", "type": "function", "function": {"name": "choose", "arguments": "{}"} | fields}
    return [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "not among the tools"),
        ({"tools": [], "tool_choice": "required"}, "not among the tools"),
        (
            {"tool_choice": "always"},
            "tool_choice: must be none, auto, required, a function by its name, or allowed_tools",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_object"}}, "leave one of them out"),
        ({"messages": called(arguments="{")}, "must be a JSON object, as text"),
        ({"messages": called(arguments="[]")}, "must be a JSON object, as text"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "belongs to messages of the assistant"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**{"messages": MESSAGES} | ONE | fields)


@pytest.mark.parametrize(
    ("template", "fields", "said"),
    [
        ("{{ messages[0].content }}", {}, "chat template has no place for them"),
        ("{{ tools }}{{ messages[0].content }}", {}, "the form in which this model calls them is not known"),
        ("{{ tools }}<tool_call><function=f>", {"tool_choice": "required"}, "cannot be asked for: use auto"),
    ],
)
def test_models_that_do_not_call(
    served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, template: str, fields: Any, said: str
) -> None:
    """Each with one sentence; without tools they answer."""
    monkeypatch.setattr(served[2], "chat_template", template)
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**ONE, messages=MESSAGES, **fields)
    client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, max_tokens=1)
