"""What a response tells of itself: tokens taken from a kept prompt, tokens of reasoning, what was sent."""

from typing import Any

import openai
import pytest

from tests.helpers.servers import MODEL_ID

THINKING = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if enable_thinking is not false %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)


def chat(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    """The usage of a chat of one message."""
    arguments: Any = {"model": MODEL_ID, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return client.chat.completions.create(**arguments | {"temperature": 0} | fields).usage


def test_tokens_from_a_kept_prompt(client: openai.OpenAI) -> None:
    """None the first time, all of them the second; `n` answers count the prompt once. So in each form."""
    first, second = chat(client, "Which cat?", n=2), chat(client, "Which cat?")
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens > 0
    plain = chat(client, "Which cat?", extra_body={"specbound": {"enabled": False}})
    assert plain.prompt_tokens_details.cached_tokens == plain.prompt_tokens
    asked: Any = {"model": MODEL_ID, "input": "Which dog?", "max_output_tokens": 4, "temperature": 0}
    found: Any = [client.responses.create(**asked).usage for _ in range(2)]
    assert [usage.input_tokens_details.cached_tokens for usage in found] == [0, found[1].input_tokens]
    text: Any = {"model": MODEL_ID, "prompt": ["Which?", "Which?"], "max_tokens": 2}
    usage: Any = client.completions.create(**text).usage
    assert usage.prompt_tokens_details.cached_tokens == 6


def test_tokens_of_reasoning(served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of an answer that never ends it, none of one that does not reason; an effort of none switches it off."""
    monkeypatch.setattr(served[2], "chat_template", THINKING)
    assert chat(client, "Who?").completion_tokens_details.reasoning_tokens == 8
    silent = [
        chat(client, "Who?", extra_body={"enable_thinking": False}),
        chat(client, "Who?", reasoning_effort="none"),
    ]
    assert [usage.completion_tokens_details.reasoning_tokens for usage in silent] == [0, 0]
    assert silent[0].prompt_tokens == silent[1].prompt_tokens
    asked: Any = {"model": MODEL_ID, "input": "Who?", "max_output_tokens": 8, "temperature": 0}
    usage: Any = client.responses.create(**asked).usage
    assert usage.output_tokens_details.reasoning_tokens == 8
    usage = client.responses.create(**asked, reasoning={"effort": "none"}).usage
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_thinking_that_cannot_be_switched_off(
    served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served[2], "chat_template", "{{ messages[0].content }}<think></think>")
    with pytest.raises(openai.BadRequestError, match="reasoning_effort: this model's thinking cannot be switched off"):
        chat(client, "Who?", reasoning_effort="none")


def test_a_response_tells_what_was_sent(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL_ID, "input": "Who?", "max_output_tokens": 2}
    found = client.responses.create(**asked, metadata={"a": "b"}, parallel_tool_calls=False, tool_choice="none")
    assert found.metadata == {"a": "b"} and not found.parallel_tool_calls and found.tool_choice == "none"
    found = client.responses.create(**asked)
    assert found.metadata == {} and found.parallel_tool_calls and found.tool_choice == "auto"


def test_token_ids_as_text(client: openai.OpenAI) -> None:
    """/detokenize undoes /tokenize; an id that the model does not have is refused."""
    url = str(client.base_url).removesuffix("v1/")
    tokens = client.post(f"{url}tokenize", body={"prompt": "Who?"}, cast_to=dict[str, Any])["tokens"]
    assert client.post(f"{url}detokenize", body={"tokens": tokens}, cast_to=dict[str, Any]) == {"prompt": "Who?"}
    with pytest.raises(openai.BadRequestError, match="each from 0 to"):
        client.post(f"{url}detokenize", body={"tokens": [10**6]}, cast_to=dict[str, Any])
