"""Logarithms of probabilities as the real `openai` client sees them: plain `generate`'s, bit for bit."""

from typing import Any

import openai
import pytest
import torch

from runtime.decoding.emitter import TargetEmitter
from tests.helpers.servers import MESSAGES, MODEL_ID, SAMPLED, chat_ids


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
    """The same in the older form, with the place of each token in the text."""
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
        """Emit with the best logit moved by a bit."""
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
