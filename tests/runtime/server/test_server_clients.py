"""What common clients send beside the question: nulls, neutral values, answers with everything they hold."""

from typing import Any

import openai
import pytest

from tests.helpers.servers import MESSAGES, MODEL_ID, chat_ids, following, stock

SILENT: list[dict[str, Any]] = [
    {"store": False, "metadata": {"a": "b"}, "user": "me", "safety_identifier": "x", "prompt_cache_key": "y"},
    {"parallel_tool_calls": False, "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none"},
    {"service_tier": "auto", "modalities": ["text"], "response_format": {"type": "text"}, "verbosity": "medium"},
    {"prediction": {"type": "content", "content": "w1 w2"}},
    {
        "audio": None,
        "web_search_options": None,
        "reasoning_effort": None,
        "stream": None,
        "colour": None,
        "stop": None,
    },
    {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}},
    {"ignore_eos": False, "min_tokens": 0, "stop_token_ids": [], "skip_special_tokens": True, "length_penalty": 1.0},
    {"cache_prompt": True, "keep_alive": "5m", "n": 1, "best_of": 1, "use_beam_search": False, "echo": False},
    {"stream_options": {"include_obfuscation": False, "include_usage": None}, "seed": None, "specbound": None},
]
LOUD: list[tuple[str, Any]] = [
    ("functions", [{"name": "f"}]),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("web_search_options", {}),
    ("reasoning_effort", "high"),
    ("best_of", 2),
    ("use_beam_search", 1),
    ("suffix", "w1"),
]


@pytest.mark.parametrize("silent", SILENT, ids=lambda fields: next(iter(fields)))
def test_what_changes_nothing_is_taken(served: Any, client: openai.OpenAI, silent: dict[str, Any]) -> None:
    """Chats and completions are answered as without it."""
    tokenizer = served[2]
    arguments: Any = {"model": MODEL_ID, "max_tokens": 8, "temperature": 0, "extra_body": silent}
    chat = client.chat.completions.create(messages=MESSAGES, **arguments)
    ids = stock(served, chat_ids(tokenizer), max_new_tokens=8, do_sample=False)
    assert chat.choices[0].message.content == tokenizer.decode(ids, skip_special_tokens=True)
    completion = client.completions.create(prompt=[20, 63, 6], **arguments)
    ids = stock(served, [20, 63, 6], max_new_tokens=8, do_sample=False)
    assert completion.choices[0].text == following(tokenizer, [20, 63, 6], ids)


@pytest.mark.parametrize(("name", "value"), LOUD, ids=[name for name, _ in LOUD])
def test_what_would_change_the_answer_is_refused_by_name(client: openai.OpenAI, name: str, value: Any) -> None:
    """Negative control of the above."""
    with pytest.raises(openai.BadRequestError, match=f"{name} is not supported by this server") as caught:
        client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, extra_body={name: value})
    assert caught.value.param == name and caught.value.type == "invalid_request_error"


def test_where_an_answer_ends(served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's `stop_token_ids`, `ignore_eos` and `min_tokens`, as stock's `generate` has them."""
    tokenizer, prompt = served[2], [20, 63, 6]
    free = stock(served, prompt, max_new_tokens=12, do_sample=False)
    ends = free[4]
    first = free.index(ends) + 1

    def ask(**extra: Any) -> tuple[str | None, int, str]:
        answer = client.completions.create(
            model=MODEL_ID, prompt=prompt, max_tokens=12, temperature=0, extra_body=extra
        )
        assert answer.usage is not None
        return answer.choices[0].finish_reason, answer.usage.completion_tokens, answer.choices[0].text

    assert ask(stop_token_ids=[ends])[:2] == ("stop", first)
    for ignore in (False, True):
        asked = {"stop_token_ids": [ends], "min_tokens": 9, "ignore_eos": ignore}
        ids = stock(served, prompt, max_new_tokens=12, min_new_tokens=9, eos_token_id=[ends], do_sample=False)
        assert ask(**asked)[1:] == (len(ids), following(tokenizer, prompt, ids))
    monkeypatch.setattr(served[1].generation_config, "eos_token_id", ends)
    assert ask()[:2] == ("stop", first)
    assert ask(ignore_eos=True) == ("length", 12, following(tokenizer, prompt, free))
    for wrong, said in (
        ({"stop_token_ids": [10**6]}, "is no token id"),
        ({"min_tokens": 13}, "the answer has at most 12 tokens"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "go on where a bound answer ends"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            body: Any = {"max_tokens": 12} | wrong
            client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, extra_body=body)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_length(client: openai.OpenAI, name: str) -> None:
    """On completions too."""
    answer = client.completions.create(model=MODEL_ID, prompt=[20, 63, 6], extra_body={name: 3})
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_an_answer_is_as_long_as_the_context_allows(client: openai.OpenAI) -> None:
    """Unless told otherwise."""
    answer = client.completions.create(model=MODEL_ID, prompt=[20, 63, 6], max_tokens=253, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 253
    chat = client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, temperature=0)
    assert chat.usage is not None and chat.usage.total_tokens == 256


@pytest.mark.parametrize(
    "held",
    [
        {"content": "w5", "id": "msg_1", "annotations": [], "provider_specific_fields": {}, "tool_calls": []},
        {"content": [{"type": "text", "text": "w5", "cache_control": {"type": "ephemeral"}}], "audio": None},
        {"content": "w5", "reasoning": "w9 w9", "function_call": None},  # which this template does not read
        {"content": None, "refusal": "w5"},
    ],
)
def test_answers_are_sent_back(served: Any, client: openai.OpenAI, held: Any) -> None:
    """With what clients hold of them."""
    turns = [*MESSAGES, {"role": "assistant", "content": "w5"}, {"role": "user", "content": "w1"}]
    messages: Any = [*turns[:2], {"role": "assistant"} | held, turns[3]]
    found = client.chat.completions.create(model=MODEL_ID, messages=messages, max_tokens=6, temperature=0)
    ids = served[2].apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    expected = stock(served, ids, max_new_tokens=6, do_sample=False)
    assert found.choices[0].message.content == served[2].decode(expected, skip_special_tokens=True)


def test_an_answer_without_text_is_empty(served: Any, client: openai.OpenAI) -> None:
    empty: Any = [*MESSAGES, {"role": "assistant", "content": None}]
    found = client.chat.completions.create(model=MODEL_ID, messages=empty, max_tokens=1)
    assert found.usage is not None and found.usage.prompt_tokens == len(chat_ids(served[2])) + 1
