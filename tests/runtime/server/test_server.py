"""The server as the real `openai` client sees it: its text is stock `generate`'s, streamed or whole."""

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from runtime import SpeculationBounds
from runtime.decoding.emitter import TargetEmitter
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.paths import ROOT
from tests.helpers.servers import MODEL_ID, running

TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
MESSAGES: Any = [{"role": "system", "content": "w5 w9"}, {"role": "user", "content": "w17 w60 w3"}]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 11}


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[tuple[str, Any, Any]]:
    """Address, model and tokenizer; drafts come at random, so most are wrong and some are right."""
    model, tokenizer = make_model(max_position_embeddings=256), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    attach(model, SpecBound(model, FakeHeads("random", [2, 4], vocabulary=3), SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, tokenizer)) as (url, _):
        yield url, model, tokenizer


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def stock(served: Any, ids: list[int], *, seed: int | None = None, **options: Any) -> list[int]:
    """New ids of plain `generate`."""
    _, model, _ = served
    if seed is not None:
        torch.manual_seed(seed)
    with model.specbound.disabled():
        found: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return found


def chat_ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


@pytest.mark.parametrize("request_options", [{}, {"temperature": 0}, SAMPLED, SAMPLED | {"seed": 12}])
def test_chat_streamed_whole_and_stock(served: Any, client: openai.OpenAI, request_options: dict[str, Any]) -> None:
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
    text = tokenizer.decode(
        stock(served, [20, 63, 6], seed=4, max_new_tokens=16, do_sample=True), skip_special_tokens=True
    )
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


def plain_logprobs(served: Any, ids: list[int], **options: Any) -> tuple[list[int], list[torch.Tensor]]:
    """New ids of plain `generate`, and logarithms of all probabilities [V] at each."""
    _, model, _ = served
    torch.manual_seed(11)
    with model.specbound.disabled():
        found = model.generate(
            torch.tensor([ids]), max_new_tokens=20, output_logits=True, return_dict_in_generate=True, **options
        )
    return found.sequences[0, len(ids) :].tolist(), [torch.log_softmax(row[0], -1) for row in found.logits]


@pytest.mark.parametrize("request_options", [{"temperature": 0}, SAMPLED])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chats(served: Any, client: openai.OpenAI, request_options: dict[str, Any], stream: bool) -> None:
    """Bit for bit those of plain `generate`, for the chosen token and the likeliest."""
    tokenizer = served[2]
    options: Any = {"temperature": 0.8, "top_p": 0.9} if request_options["temperature"] else {}
    ids, rows = plain_logprobs(served, chat_ids(tokenizer), do_sample=bool(options), **options)
    answer: Any = client.chat.completions.create(
        model=MODEL_ID, messages=MESSAGES, max_tokens=20, logprobs=True, top_logprobs=3, stream=stream,
        **request_options,
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    if stream:  # each stands with its own text
        told = [choice for choice in choices if choice.logprobs]
        assert len(told) > 15 and all(choice.delta.content is not None for choice in told[:-1])
    assert [entry.logprob for entry in entries] == [float(row[id]) for row, id in zip(rows, ids, strict=True)]
    assert [entry.token for entry in entries] == [tokenizer.decode([id]) for id in ids]
    assert bytes(entries[0].bytes).decode() == entries[0].token
    for entry, row in zip(entries, rows, strict=True):
        best = row.topk(3)
        assert [one.logprob for one in entry.top_logprobs] == best.values.tolist()
        assert [one.token for one in entry.top_logprobs] == [tokenizer.decode([id]) for id in best.indices.tolist()]
    assert served[1].specbound.stats.rounds > 0  # the last call speculated


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(served: Any, client: openai.OpenAI, stream: bool) -> None:
    tokenizer = served[2]
    ids, rows = plain_logprobs(served, [20, 63, 6], do_sample=False)
    arguments: Any = {"model": MODEL_ID, "prompt": [20, 63, 6], "max_tokens": 20, "temperature": 0, "stream": stream}
    answer: Any = client.completions.create(logprobs=2, **arguments)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    found = [choice.logprobs for choice in choices if choice.logprobs]
    assert [value for one in found for value in one.token_logprobs] == [
        float(r[i]) for r, i in zip(rows, ids, strict=True)
    ]
    tops = [top for one in found for top in one.top_logprobs]
    for top, row, id in zip(tops, rows, ids, strict=True):
        best = row.topk(2)
        expected = dict(zip(map(tokenizer.decode, best.indices.tolist()), best.values.tolist(), strict=True))
        assert top == {tokenizer.decode([id]): float(row[id])} | expected
    text = "".join(choice.text for choice in choices)
    offsets = [offset for one in found for offset in one.text_offset]
    tokens = [token for one in found for token in one.tokens]
    assert tokens == [tokenizer.decode([id]) for id in ids]
    placed = [(offset, token) for offset, token, id in zip(offsets, tokens, ids, strict=True) if id > 2]  # not special
    assert len(placed) > 15 and all(text[offset:].lstrip().startswith(token) for offset, token in placed)
    alone: Any = client.completions.create(logprobs=0, **arguments | {"stream": False}).choices[0].logprobs
    assert [list(top) for top in alone.top_logprobs] == [[token] for token in tokens]
    assert client.completions.create(**arguments | {"stream": False}).choices[0].logprobs is None


def test_logprobs_see_a_single_bit(served: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one logit a bit away from plain decoding's changes what is told."""
    stock = TargetEmitter.emit

    def nudged(self: TargetEmitter, logits: torch.Tensor) -> tuple[int, bool]:
        logits = logits.clone()
        best = logits.argmax()
        logits[0, best] = torch.nextafter(logits[0, best], torch.tensor(torch.inf))
        return stock(self, logits)

    monkeypatch.setattr(TargetEmitter, "emit", nudged)
    ids, rows = plain_logprobs(served, [20, 63, 6], do_sample=False)
    answer = client.completions.create(model=MODEL_ID, prompt=[20, 63, 6], max_tokens=20, temperature=0, logprobs=2)
    found: Any = answer.choices[0].logprobs
    assert found.tokens == [served[2].decode([id]) for id in ids]
    assert found.token_logprobs != [float(row[id]) for row, id in zip(rows, ids, strict=True)]


def test_logprobs_and_stop_strings(served: Any, client: openai.OpenAI) -> None:
    """Every token is told, held back or not; the streamed ones are the whole answer's."""
    ids, _ = plain_logprobs(served, [20, 63, 6], do_sample=False)
    stop = f"{served[2].decode(ids[6:8])} "
    arguments: Any = {"model": MODEL_ID, "prompt": [20, 63, 6], "max_tokens": 20, "temperature": 0, "stop": stop}
    whole = client.completions.create(logprobs=1, **arguments)
    told: Any = whole.choices[0].logprobs
    assert len(told.tokens) == whole.usage.completion_tokens  # type: ignore[union-attr]
    parts: Any = [
        chunk.choices[0].logprobs for chunk in client.completions.create(logprobs=1, stream=True, **arguments)
    ]
    assert [value for part in parts if part for value in part.token_logprobs] == told.token_logprobs


def test_models(client: openai.OpenAI) -> None:
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
        found = client.completions.create(model=MODEL_ID, prompt=[20, 63], seed=seed, temperature=1, max_tokens=8)
        return found.choices[0].text

    seeds = [1, 2, 3, 1, 2, 3, 1, 2]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, seeds))
    alone = {
        seed: served[2].decode(stock(served, [20, 63], seed=seed, max_new_tokens=8, do_sample=True)) for seed in seeds
    }
    assert texts == [alone[seed] for seed in seeds]


def test_the_documented_snippet(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/serving.md, at this server's address."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(snippet.replace("http://127.0.0.1:8000", served[0]), "serving.md", "exec"), {})
    assert "mean_accepted_length" in capsys.readouterr().out
