"""Several answers to one request: `n`, several prompts, prompts echoed with their probabilities."""

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from runtime.server.request.limits import Limits
from tests.helpers.servers import MESSAGES, MODEL_ID, PROMPT, Served, chat_ids, following, held, stock, until

OTHER = [5, 9, 33, 40]


def texts_of(stream: Any) -> tuple[list[str], list[str]]:
    """Joined pieces and finish reasons of a stream's choices."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return [texts[index] for index in sorted(texts)], [reasons[index] for index in sorted(reasons)]


def test_n_choices_of_a_chat(served: Any, client: openai.OpenAI) -> None:
    """Each is stock's under the next seed; usage counts the prompt once and all that was written."""
    ids = chat_ids(served[2])
    expected = [
        served[2].decode(
            stock(served, ids, seed=11 + index, max_new_tokens=12, do_sample=True), skip_special_tokens=True
        )
        for index in range(3)
    ]
    assert len(set(expected)) == 3
    arguments: Any = {"model": MODEL_ID, "messages": MESSAGES, "max_tokens": 12, "temperature": 1, "seed": 11, "n": 3}
    whole = client.chat.completions.create(**arguments)
    assert [choice.message.content for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    usage: Any = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 36) and usage.specbound["emitted"] == 36
    told: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(stream=True, stream_options=told, **arguments))
    assert texts_of(chunks) == (expected, ["length"] * 3)
    for index in range(3):  # each choice counts its own
        so_far = [chunk.usage for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        counts = [usage.completion_tokens for usage in so_far]
        assert counts == sorted(counts) and counts[-1] == 12
        assert {usage.prompt_tokens for usage in so_far} == {len(ids)}
    assert sum(chunk.choices[0].delta.role == "assistant" for chunk in chunks if chunk.choices) == 3
    last: Any = chunks[-1].usage
    assert last.completion_tokens == 36 and not chunks[-1].choices


@pytest.mark.parametrize("prompts", [[PROMPT, OTHER], ["w17 w60 w3", "w2 w6 w30 w37"]])
def test_several_prompts(served: Any, client: openai.OpenAI, prompts: Any) -> None:
    """Choices stand in the order of the prompts, `n` of each."""
    expected = [
        following(served[2], ids, stock(served, ids, seed=seed, max_new_tokens=10, do_sample=True))
        for ids in (PROMPT, OTHER)
        for seed in (3, 4)
    ]
    arguments: Any = {"model": MODEL_ID, "prompt": prompts, "max_tokens": 10, "temperature": 1, "seed": 3, "n": 2}
    whole = client.completions.create(**arguments)
    assert [choice.text for choice in whole.choices] == expected
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 40)
    assert texts_of(client.completions.create(stream=True, **arguments))[0] == expected


@pytest.fixture(scope="module")
def prompt_rows(make_model: Any) -> Any:
    """Of a list of ids: logarithms of all probabilities [V] at each, by the forward of a model without adapter."""
    model = make_model(max_position_embeddings=256)

    def rows(ids: list[int]) -> list[torch.Tensor]:
        """The figures."""
        with torch.no_grad():
            return list(torch.log_softmax(model(torch.tensor([ids])).logits[0], -1))

    return rows


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(served: Any, client: openai.OpenAI, prompt_rows: Any, stream: bool) -> None:
    """As lm-eval's loglikelihood asks: the prompt's own probabilities, bit for bit, then the answer's."""
    tokenizer = served[2]
    rows = prompt_rows(OTHER)
    ids = stock(served, OTHER, max_new_tokens=3, do_sample=False)
    arguments: Any = {"model": MODEL_ID, "prompt": [OTHER, PROMPT], "temperature": 0, "echo": True, "logprobs": 1}
    answer: Any = client.completions.create(max_tokens=3, stream=stream, **arguments)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    first = [choice for choice in choices if choice.index == 0]
    assert "".join(choice.text for choice in first) == tokenizer.decode(OTHER + ids)
    told = [choice.logprobs for choice in first if choice.logprobs]
    tokens, values, tops, offsets = (
        [one for logprobs in told for one in getattr(logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert tokens == [tokenizer.decode([id]) for id in OTHER + ids]
    assert values[:4] == [None] + [float(row[id]) for row, id in zip(rows, OTHER[1:], strict=False)]
    assert tops[0] is None and len(values) == len(tops) == 7
    for top, row, id in zip(tops[1:4], rows, OTHER[1:], strict=False):
        best = int(row.argmax())
        assert top == {tokenizer.decode([best]): float(row[best]), tokenizer.decode([id]): float(row[id])}
    assert offsets[:4] == [0, 2, 5, 9] and offsets[4] == len(tokenizer.decode(OTHER))


def test_only_the_prompt_back(served: Any, client: openai.OpenAI, prompt_rows: Any) -> None:
    """Nothing is generated where no token is asked for; and an echo without figures is text alone."""
    arguments: Any = {"model": MODEL_ID, "prompt": "w17  w60 w3", "echo": True}
    found: Any = client.completions.create(max_tokens=0, logprobs=0, **arguments)
    assert found.choices[0].text == "w17  w60 w3" and found.usage.completion_tokens == 0
    rows = prompt_rows(PROMPT)
    assert found.choices[0].logprobs.token_logprobs[1:] == [float(rows[0][63]), float(rows[1][6])]
    text = following(served[2], PROMPT, stock(served, PROMPT, max_new_tokens=5, do_sample=False))
    plain: Any = client.completions.create(max_tokens=5, temperature=0, **arguments)
    assert plain.choices[0].text == "w17  w60 w3" + text and plain.choices[0].logprobs is None


@pytest.fixture(scope="module")
def held_server(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    with held(make_model(), make_tokenizer()) as found:
        yield found


def test_a_request_has_one_place_in_the_queue(held_server: Served) -> None:
    """However many prompts it has: its next answer waits at the end of the line, where others find room too."""
    held_server.hold()
    found: dict[str, Any] = {}
    prompts = [[20 + number, 63, 6] for number in range(32)]  # as lm-eval sends them
    asked: dict[str, dict[str, Any]] = {"many": {"prompt": prompts, "max_tokens": 4}, "one": {"max_tokens": 4}}

    def ask(name: str) -> None:
        found[name] = held_server.complete(temperature=0, **asked[name])

    threads = [threading.Thread(target=ask, args=(name,)) for name in asked]
    threads[0].start()
    until(held_server.valve.reached.is_set)
    assert held_server.worker.num_waiting == 31
    threads[1].start()
    until(lambda: held_server.worker.num_waiting == 32)
    with pytest.raises(openai.RateLimitError, match="2 requests are waiting already"):
        held_server.complete()
    held_server.valve.open.set()
    for thread in threads:
        thread.join(60)
    assert len(found["many"].choices) == 32 and len(found["one"].choices) == 1
    alone = [
        held_server.complete(prompt=prompt, max_tokens=4, temperature=0).choices[0].text for prompt in prompts[:4]
    ]
    assert [choice.text for choice in found["many"].choices[:4]] == alone


def test_choices_are_streamed_as_they_come(make_model: Any, make_tokenizer: Any) -> None:
    """Two that run together are told together, not one after the other."""
    with held(make_model(), make_tokenizer(), Limits(max_running=2)) as served:
        chunks = list(served.complete(prompt=[PROMPT, OTHER], max_tokens=40, temperature=0, stream=True))
        indices = [choice.index for chunk in chunks for choice in chunk.choices]
        assert indices.index(1) < len(indices) - 1 - indices[::-1].index(0) and indices != sorted(indices)
        whole = served.complete(prompt=[PROMPT, OTHER], max_tokens=40, temperature=0)
        assert texts_of(chunks)[0] == [choice.text for choice in whole.choices]


def test_choices_that_nobody_waits_for_leave_the_queue(held_server: Served) -> None:
    held_server.hold()
    connection = held_server.send(n=3, max_tokens=100)
    until(lambda: held_server.valve.reached.is_set() and held_server.worker.num_waiting == 2)
    connection.close()
    until(lambda: held_server.worker.num_waiting == 0)
    held_server.valve.open.set()
    until(held_server.idle)
    assert len(held_server.complete().choices) == 1
