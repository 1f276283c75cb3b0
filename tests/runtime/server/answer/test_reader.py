"""Text of a model, in pieces of any size, split into content, reasoning and calls of tools."""

import json
from typing import Any

import pytest
import torch

from runtime.server.answer.reader import Reader
from runtime.server.dialect import FORMS, HERMES, LLAMA, MISTRAL, MISTRAL_LIST, XML, Dialect
from runtime.text.transcript import Transcript

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "now"}},
]
ADD = ("add", {"a": 1})
BAD = '<tool_call>\n{"name": add}\n</tool_call>'
# The form, the text, and what is in it: content, reasoning, calls.
CASES: list[tuple[Any, str, tuple[str, str, list[Any]]]] = [
    (HERMES, "Just text, 1 < 2 <tool", ("Just text, 1 < 2 <tool", "", [])),
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', ("", "", [ADD])),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", [ADD])),
    (
        HERMES,
        '<think>\nhm\n</think>\n\nYes.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n',
        ("Yes.", "hm", [ADD, ("now", {})]),
    ),
    (HERMES, f"No. {BAD} really", ('No.<tool_call>{"name": add}\n</tool_call> really', "", [])),
    (HERMES, '<tool_call>\n{"name": "add", "argum', ('<tool_call>{"name": "add", "argum', "", [])),
    (HERMES, '<tool_call>["add"]</tool_call>', ('<tool_call>["add"]</tool_call>', "", [])),
    (HERMES, '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
     ('<tool_call>{"name": "add", "arguments": 5}</tool_call>', "", [])),
    (XML, "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", ("", "", [ADD])),
    (LLAMA, '{"name": "add", "parameters": {"a": 1}}', ("", "", [ADD])),
    (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', ("", "", [ADD])),
    (LLAMA, 'It is {"name": "add"}', ('It is {"name": "add"}', "", [])),
    (LLAMA, '{"name": "add", "parame', ('{"name": "add", "parame', "", [])),
    (MISTRAL_LIST, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]',
     ("", "", [ADD, ("now", {})])),
    (MISTRAL, 'So[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}', ("So", "", [ADD, ("now", {})])),
]  # fmt: skip


def joined(reader: Reader, text: str, size: int) -> tuple[str, str, list[Any]]:
    """What the deltas say, put together as clients do."""
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    assert (content, reasoning) == (reader.content, reader.reasoning)
    assert [{key: call[key] for key in call if key != "index"} for call in calls] == reader.calls
    assert all(len(call["id"]) == 9 and call["type"] == "function" for call in calls)
    functions = [call["function"] for call in calls]
    return content, reasoning, [(one["name"], json.loads(one["arguments"])) for one in functions]


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(("form", "text", "parts"), CASES, ids=lambda one: one[:24] if isinstance(one, str) else None)
def test_texts_of_all_forms(form: Any, text: str, parts: Any, size: int) -> None:
    dialect = Dialect(thinks=True, calls=form)
    assert joined(Reader(dialect, tools=TOOLS), text, size) == parts


@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_not_looked_for_is_text(size: int) -> None:
    """Negative control: no calls without tools, no reasoning without its marks."""
    for form, text, (_, _, calls) in CASES:
        if calls:
            plain = Dialect(calls=form)
            assert joined(Reader(plain), text, size) == (text, "", [])


@pytest.mark.parametrize(
    ("opening", "parts"),
    [
        ("", ("hm</think>\n\nYes", "", [])),
        ("<think>", ("Yes", "hm", [])),
        ("<think>\nso", ("Yes", "hm", [])),
        ("<think>\n\n</think>\n\n", ("hm</think>\n\nYes", "", [])),
    ],
)
def test_the_prompt_may_begin_the_reasoning(opening: str, parts: Any) -> None:
    assert joined(Reader(Dialect(thinks=True), opening), "hm</think>\n\nYes", 1) == parts


def test_a_single_call() -> None:
    text = CASES[3][1]
    assert joined(Reader(Dialect(thinks=True, calls=HERMES), tools=TOOLS, single=True), text, 3)[2] == [ADD]


def test_a_template_of_the_tokenizer() -> None:
    """It is taken before ours; where it does not fit the text, the rest of that is content."""
    own = {
        "start_anchor": "assistant:",
        "fields": {
            "content": {"close": "<end>"},
            "thinking": {"open": "(", "close": ")"},
            "tool_calls": {"open": "[", "close": "]", "content": "json", "transform": {"function": "{content}"}},
        },
    }
    dialect, prompt = Dialect(own=own), "user: (a\nassistant:"
    assert joined(Reader(dialect, prompt, TOOLS), '(hm)Yes[{"name": "now"}]<end>', 2) == ("Yes", "hm", [("now", {})])
    assert joined(Reader(dialect, prompt, TOOLS), "Yes[now] (b)", 1)[0].startswith("Yesnow")


def test_a_call_that_is_nested_too_deep_is_text() -> None:
    """Nobody can read it; the rest is text too."""
    text = 'Yes<tool_call>\n{"name": "add", "arguments": ' + '{"a": ' * 3000 + "}" * 3001 + "\n</tool_call> so"
    content, _, calls = joined(Reader(Dialect(calls=HERMES), tools=TOOLS), text, 1000)
    assert not calls and content.replace("\n", "") == text.replace("\n", "")


class Templated:
    """As much of a tokenizer as a dialect asks for."""

    def __init__(self, text: str, vocabulary: tuple[str, ...] = ()) -> None:
        self.chat_template, self.vocabulary = text, dict.fromkeys(vocabulary, 0)

    def get_chat_template(self, tools: Any = None) -> str:
        return self.chat_template

    def get_added_vocab(self) -> dict[str, int]:
        return self.vocabulary


QWEN = '{%- if tools %}return a json object within <tool_call></tool_call>{{ "<think>\\n\\n</think>" }}{%- endif %}'
LLAMA_TEXT = (
    '{%- if tools %}{"name": function name, "parameters": dictionary of argument name and its value}{%- endif %}'
)


@pytest.mark.parametrize(
    ("text", "calls", "thinks"),
    [
        (QWEN, HERMES, True),
        (QWEN + "<function=example>", XML, True),
        (LLAMA_TEXT, LLAMA, False),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS] [", MISTRAL_LIST, False),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]name[ARGS]", MISTRAL, False),
        ("{% if tools %}{{ tools }}{% endif %}", None, False),
    ],
)
def test_the_dialect_is_seen_in_the_template(text: str, calls: Any, thinks: bool) -> None:
    found = Dialect.of(Templated(text))
    assert (found.calls, found.thinks, found.takes_tools) == (calls, thinks, True)
    assert Dialect.of(Templated(text, ("<think>", "</think>"))).thinks
    bare = Dialect.of(Templated("{{ messages[0].content }}"))
    assert bare == Dialect() and bare.template(calls=True) is None
    assert len(FORMS) == 5


def test_marks_may_be_special_tokens(make_letter_tokenizer: Any) -> None:
    """Which are text where they are looked for, and no text elsewhere; other special tokens never are."""
    tokenizer = make_letter_tokenizer(("[TOOL_CALLS]", "<end>"))
    text = '[TOOL_CALLS][{"name": "now"}]'
    hidden = Dialect(calls=MISTRAL_LIST).hidden(tokenizer)
    for seen, expected in ((hidden, text), (None, text.removeprefix("[TOOL_CALLS]"))):
        transcript = Transcript(tokenizer, hidden=seen)
        for id in tokenizer(f"{text}<end>")["input_ids"]:
            transcript(torch.tensor([[id]]), None)
        transcript.end()
        assert transcript.text == expected
