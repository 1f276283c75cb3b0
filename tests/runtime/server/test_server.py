"""The server as the real `openai` client sees it: its text is stock `generate`'s, streamed or whole."""

import re
from typing import Any

import openai
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.servers import MESSAGES, MODEL_ID, SAMPLED, chat_ids, following, stock


@pytest.mark.parametrize("request_options", [{}, {"temperature": 0}, SAMPLED, SAMPLED | {"seed": 12}])
def test_chat_streamed_whole_and_stock(served: Any, client: openai.OpenAI, request_options: dict[str, Any]) -> None:
    """Text, usage and finish reason of a chat are stock's, in one piece or many."""
    tokenizer = served[2]
    options = {key: value for key, value in request_options.items() if key != "seed"}
    options = {"do_sample": bool(options.get("temperature"))} | {k: v for k, v in options.items() if v}
    expected = stock(served, chat_ids(tokenizer), seed=request_options.get("seed"), max_new_tokens=30, **options)
    text = tokenizer.decode(expected, skip_special_tokens=True)

    whole = client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, max_tokens=30, **request_options)
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 30
    assert whole.usage.prompt_tokens == len(chat_ids(tokenizer)) == whole.usage.total_tokens - 30
    speculation: Any = whole.usage.specbound  # type: ignore[attr-defined]
    assert speculation["speculated"] and speculation["emitted"] == 30 and speculation["drafted"]["2"] > 0

    stream = client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, max_completion_tokens=30, stream=True,
        stream_options={"include_usage": True}, **request_options,
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "length" and not chunks[-1].choices
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 15
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("position", [3, 14])
def test_stop_strings(served: Any, client: openai.OpenAI, position: int) -> None:
    """The text of stock `generate` up to the stop string; that ids are stock's, test_transcript.py says."""
    tokenizer = served[2]
    ids = chat_ids(tokenizer)
    unstopped = stock(served, ids, max_new_tokens=30, do_sample=False)
    stop = [f"{tokenizer.decode([unstopped[position]])} ", "never"]
    text = tokenizer.decode(unstopped, skip_special_tokens=True)
    text = text[: text.index(stop[0])]
    arguments: Any = {"model": MODEL_ID, "messages": MESSAGES, "max_tokens": 30, "temperature": 0, "stop": stop}
    whole = client.chat.completions.create(**arguments)
    assert whole.choices[0].message.content == text and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens <= position + 2
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **arguments)
    ]
    assert "".join(pieces) == text


@pytest.mark.parametrize("prompt", ["w17 w60 w3", ["w17 w60 w3"], [20, 63, 6]])
def test_completions(served: Any, client: openai.OpenAI, prompt: Any) -> None:
    """Text, a list of one, or ids; 16 tokens unless told."""
    tokenizer = served[2]
    ids = stock(served, [20, 63, 6], seed=4, max_new_tokens=16, do_sample=True)
    text = following(tokenizer, [20, 63, 6], ids)
    arguments: Any = {"model": MODEL_ID, "prompt": prompt, "seed": 4, "temperature": 1}
    assert client.completions.create(**arguments).choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **arguments)) == text


def test_rounds_on_request(served: Any, client: openai.OpenAI) -> None:
    """Our extension of a stream: every token, and what drafted it; and plain decoding."""
    arguments: Any = {"model": MODEL_ID, "prompt": [20, 63, 6], "max_tokens": 20, "stream": True}
    about: list[Any] = [
        chunk.specbound  # type: ignore[attr-defined]
        for chunk in client.completions.create(extra_body={"specbound": {"rounds": True}}, **arguments)
        if getattr(chunk, "specbound", None)
    ]
    tokens = [one["token"] for one in about if "token" in one]
    rounds = [one["round"] for one in about if "round" in one]
    assert tokens == stock(served, [20, 63, 6], max_new_tokens=20, do_sample=False)
    assert sum(one["tokens"] for one in rounds) == 19
    assert all(draft["exit"] in (2, 4) for one in rounds for draft in one["drafts"])
    plain = client.completions.create(extra_body={"specbound": {"enabled": False}}, **arguments | {"stream": False})
    assert not plain.usage.specbound["speculated"] and plain.usage.specbound["rounds"] == 0


def test_models(client: openai.OpenAI) -> None:
    """The one model is listed; others are not found."""
    assert [model.id for model in client.models.list()] == [MODEL_ID]
    assert client.models.retrieve(MODEL_ID).id == MODEL_ID
    with pytest.raises(openai.NotFoundError, match="serves 'tiny' only"):
        client.models.retrieve("../other")


def test_answers_can_be_sent_back(served: Any, client: openai.OpenAI) -> None:
    """A second turn with the first answer as the client holds it, nulls and all."""
    first = client.chat.completions.create(model=MODEL_ID, messages=MESSAGES, max_tokens=4, temperature=0)
    again: Any = [
        *MESSAGES,
        first.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "w9"}]},
    ]
    second = client.chat.completions.create(model=MODEL_ID, messages=again, max_tokens=4, temperature=0)
    assert second.usage is not None and first.usage is not None
    assert second.usage.prompt_tokens == first.usage.prompt_tokens + 7  # two roles, four words, one word


def test_many_at_once_are_answered_alike(served: Any, client: openai.OpenAI) -> None:
    """Requests one after another from several threads: each its own text."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(seed: int) -> str:
        """Text of one request."""
        found = client.completions.create(model=MODEL_ID, prompt=[20, 63], seed=seed, temperature=1, max_tokens=8)
        return found.choices[0].text

    seeds = [1, 2, 3, 1, 2, 3, 1, 2]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, seeds))
    alone = {
        seed: following(served[2], [20, 63], stock(served, [20, 63], seed=seed, max_new_tokens=8, do_sample=True))
        for seed in seeds
    }
    assert texts == [alone[seed] for seed in seeds]


def test_the_documented_snippet(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of docs/serving.md, at this server's address; test_batch.py has the others."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    exec(compile(snippet.replace("http://127.0.0.1:8000", served[0]), "serving.md", "exec"), {})
    assert "mean_accepted_length" in capsys.readouterr().out
