"""Answers bound to JSON: the text is stock `generate`'s with the same mask, and keeps to the schema."""

import json
import random
import re
import sys
from typing import Any

import openai
import pytest
import torch
from transformers import LogitsProcessorList

from runtime.errors import SpecBoundError
from runtime.server.dialect import HERMES, Dialect
from runtime.server.grammar import Grammar, GrammarMask, grammar_of, lark_of, special_literals
from runtime.server.penalties import CountPenalties
from runtime.server.request.schema import ChatRequest
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.paths import ROOT
from tests.helpers.servers import MODEL_ID, stock

pytest.importorskip("llguidance")

MESSAGES: Any = [{"role": "user", "content": "Who?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "at": {"$ref": "#/$defs/place"},
    },
    "required": ["kind", "age", "at"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["home", "away"]}},
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}


def asked(**fields: Any) -> ChatRequest:
    """A request, as the server reads it."""
    return ChatRequest.model_validate({"model": MODEL_ID, "messages": MESSAGES} | fields)


def ids_of(tokenizer: Any) -> list[int]:
    """Of the prompt."""
    ids: list[int] = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def fits(text: str) -> bool:
    """Whether a text is JSON of the schema."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(found, dict) and found.keys() == {"kind", "age", "at"} and found["kind"] in ("cat", "dog")
        and type(found["age"]) is int and 0 <= found["age"] <= 99 and found["at"] in ("home", "away")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 1, "seed": 3}, {"do_sample": True}),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 4}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_json_of_a_schema(
    served: Any, client: openai.OpenAI, heads: FakeHeads, given: dict[str, Any], options: dict[str, Any]
) -> None:
    """Streamed and whole, while drafts are accepted; and without the mask the text is another and no JSON."""
    _, model, tokenizer = served
    ids = ids_of(tokenizer)
    grammar = grammar_of(model, tokenizer, asked(response_format=FORMAT), Dialect.of(tokenizer), "")
    assert grammar is not None
    mask = LogitsProcessorList([GrammarMask(grammar, len(ids))])
    seed = given.get("seed")
    expected = stock(served, ids, seed=seed, max_new_tokens=200, logits_processor=mask, **options)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert fits(text) and expected[-1] == 1
    unbound = stock(served, ids, seed=seed, max_new_tokens=200, **options)
    assert not fits(tokenizer.decode(unbound, skip_special_tokens=True))

    heads.truth = ids + expected
    arguments: Any = {"model": MODEL_ID, "messages": MESSAGES, "max_tokens": 200, "response_format": FORMAT} | given
    whole = client.chat.completions.create(**arguments)
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "stop"
    usage: Any = whole.usage
    assert sum(usage.specbound["accepted"].values()) > 5 and usage.specbound["rounds"] < len(expected)
    chunks = list(client.chat.completions.create(stream=True, **arguments))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text and len(chunks) > 10
    plain = client.chat.completions.create(extra_body={"specbound": {"enabled": False}}, **arguments)
    assert plain.choices[0].message.content == text


def test_several_answers_and_penalties(served: Any, client: openai.OpenAI) -> None:
    """Made together, each with a matcher of its own, they are stock's of the same seeds and processors."""
    _, model, tokenizer = served
    found = client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, max_tokens=200, response_format=FORMAT, n=3, temperature=1, seed=5,
        frequency_penalty=0.5, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    texts = [str(choice.message.content) for choice in found.choices]
    ids = ids_of(tokenizer)
    grammar = grammar_of(model, tokenizer, asked(response_format=FORMAT), Dialect.of(tokenizer), "")
    assert grammar is not None
    expected = []
    for seed in (5, 6, 7):
        both = [CountPenalties(len(ids), presence=0, frequency=0.5), GrammarMask(grammar, len(ids))]
        options = {"max_new_tokens": 200, "do_sample": True, "logits_processor": LogitsProcessorList(both)}
        expected.append(tokenizer.decode(stock(served, ids, seed=seed, **options), skip_special_tokens=True))
    assert texts == expected and all(fits(text) for text in texts) and len(set(texts)) > 1
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content


def test_any_object(served: Any, client: openai.OpenAI) -> None:
    """`json_object` begins one; what is cut at its length is not whole, and says so."""
    found = client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, max_tokens=30, temperature=0, response_format={"type": "json_object"}
    )
    assert str(found.choices[0].message.content).lstrip().startswith("{")
    assert found.choices[0].finish_reason in ("stop", "length")


def test_the_mask_is_a_function_of_the_ids(served: Any) -> None:
    """In whatever order it is asked; and ids that are not of the grammar are an error."""
    _, model, tokenizer = served
    grammar = grammar_of(model, tokenizer, asked(response_format=FORMAT), Dialect.of(tokenizer), "")
    assert grammar is not None
    prompt = [5, 6]
    ids = prompt + tokenizer('{"kind": "cat", "age": 7, "at": "home"}')["input_ids"]
    scores = torch.zeros(1, model.config.vocab_size)
    fresh = [GrammarMask(grammar, 2)(torch.tensor([ids[:end]]), scores) for end in range(2, len(ids) + 1)]
    assert not scores.any() and bool(torch.isinf(fresh[0]).any())
    assert [id for id, score in enumerate(fresh[-1][0].tolist()) if score == 0] == [1]  # the end, and nothing else
    one, order = GrammarMask(grammar, 2), list(range(2, len(ids) + 1)) * 2
    random.Random(0).shuffle(order)
    for end in order:
        assert torch.equal(one(torch.tensor([ids[:end]]), scores), fresh[end - 2])
    with pytest.raises(SpecBoundError, match="does not go on"):
        one(torch.tensor([prompt + tokenizer("no")["input_ids"]]), scores)


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"enum": []}, {"type": "string", "pattern": "("}])
def test_a_schema_that_cannot_be_kept_is_told_without_our_grammar(client: openai.OpenAI, schema: Any) -> None:
    format: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=r"cannot be kept: .{10}") as caught:
        client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, max_tokens=2, response_format=format)
    assert not re.search("start:|%json|<state>|Parser", str(caught.value))


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}, "cannot be kept"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}}, "cannot be kept"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "^(?=a)a"}}},
            "cannot be kept: [^0-9].*regex parse error: [^ ]",
        ),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
        ({"type": "json_schema"}, "needs a json_schema"),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "no other type has one"),
        ({"type": "xml"}, "response_format.type"),
    ],
)
def test_formats_that_cannot_be_kept(client: openai.OpenAI, format: Any, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, response_format=format)


def test_without_the_library(served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named; other requests are answered."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"response_format .* without specbound\[grammar\]") as caught:
        client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, response_format=FORMAT)
    assert caught.value.param == "response_format"
    client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, max_tokens=2)


def accepts(grammar: Grammar, tokenizer: Any, text: str) -> bool:
    """Whether a text is all of what the grammar asks for."""
    matcher = grammar.matcher.deep_copy()
    ids = tokenizer(text)["input_ids"]
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


@pytest.mark.parametrize("special", [(), ("<think>", "</think>", "<tool_call>", "</tool_call>")])
def test_what_is_bound_comes_after_the_reasoning(make_letter_tokenizer: Any, special: tuple[str, ...]) -> None:
    """Which may be there, or must end where the prompt has begun it; marks are tokens or text."""
    tokenizer = make_letter_tokenizer(special)
    dialect = Dialect(thinks=True, calls=HERMES)
    literal = special_literals(tokenizer)
    assert literal("a<think>").startswith('"a" <[') == bool(special)
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "now")]
    bound = {
        '{"kind": "cat", "age": 1, "at": "home"}': asked(response_format=FORMAT),
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>': asked(tools=tools, tool_choice="required"),
    }
    for text, body in bound.items():
        free = Grammar(tokenizer, [1], lark_of(body, dialect, "", literal))
        opened = Grammar(tokenizer, [1], lark_of(body, dialect, "<think>", literal))
        assert accepts(free, tokenizer, text) and accepts(free, tokenizer, f"<think>hm {{</think>\n\n{text}")
        assert accepts(opened, tokenizer, f"hm {{</think>\n\n{text}") and not accepts(opened, tokenizer, text)
        assert not accepts(free, tokenizer, f"hm{text}") and not accepts(free, tokenizer, text[:-1])


def test_the_documented_snippet(client: openai.OpenAI) -> None:
    """That of docs/serving.md which binds an answer."""
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (snippet,) = [one for one in snippets if "response_format" in one]
    names: dict[str, Any] = {"client": client, "model": MODEL_ID}
    exec(compile(snippet, "serving.md", "exec"), names)
    assert names["answer"].choices[0].message.content.lstrip().startswith("{")
