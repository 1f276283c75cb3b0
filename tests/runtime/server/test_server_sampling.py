"""Options of sampling, penalties and biases: the text is that of stock `generate` with the same."""

from collections import Counter
from typing import Any

import openai
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from runtime.server.penalties import CountPenalties
from tests.helpers.servers import MODEL_ID, PROMPT, following, stock


class Reference(LogitsProcessor):
    """OpenAI's formula for both penalties, id by id: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [1, V], taken down for ids after the prompt."""
        scores = scores.clone()
        for id, count in Counter(input_ids[0, len(PROMPT) :].tolist()).items():
            scores[0, id] = scores[0, id] - self.presence - self.frequency * count
        return scores


GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"min_p": 0.05}, SAMPLED | {"min_p": 0.05}),
    ({"temperature": 1.5, "min_p": 0.2}, SAMPLED | {"temperature": 1.5, "min_p": 0.2}),
    ({"temperature": 1, "top_k": -1}, SAMPLED | {"top_k": 0}),
    ({"temperature": 1, "top_k": 3}, SAMPLED | {"top_k": 3}),
    ({"temperature": 0, "repetition_penalty": 1.3}, GREEDY | {"repetition_penalty": 1.3}),
    ({"temperature": 1, "repetition_penalty": 2}, SAMPLED | {"repetition_penalty": 2.0}),
    ({"temperature": 0, "logit_bias": {"7": -100, "9": 6}}, GREEDY | {"sequence_bias": [[[7], -100.0], [[9], 6.0]]}),
    ({"temperature": 0.9, "logit_bias": {"9": 4.5}}, SAMPLED | {"temperature": 0.9, "sequence_bias": [[[9], 4.5]]}),
    ({"temperature": 0, "presence_penalty": 2}, GREEDY | {"penalties": (2, 0)}),
    ({"temperature": 0, "frequency_penalty": 1.5}, GREEDY | {"penalties": (0, 1.5)}),
    ({"temperature": 1, "presence_penalty": -1, "frequency_penalty": 0.5}, SAMPLED | {"penalties": (-1, 0.5)}),
]


@pytest.mark.parametrize(("asked", "options"), CASES, ids=lambda one: ",".join(one))
def test_options_are_those_of_generate(
    served: Any, client: openai.OpenAI, asked: dict[str, Any], options: dict[str, Any]
) -> None:
    """With speculation, streamed and whole; and the option changes the text, or the test would show nothing."""
    tokenizer = served[2]

    def text(**chosen: Any) -> str:
        """Stock's."""
        if (penalties := chosen.pop("penalties", None)) is not None:
            chosen["logits_processor"] = LogitsProcessorList([Reference(*penalties)])
        ids = stock(served, PROMPT, seed=5, max_new_tokens=40, **chosen)
        return following(tokenizer, PROMPT, ids)

    arguments: Any = {"model": MODEL_ID, "prompt": PROMPT, "max_tokens": 40, "seed": 5, "extra_body": asked}
    whole: Any = client.completions.create(**arguments)
    assert whole.usage.specbound["rounds"] > 5
    pieces = "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **arguments))
    assert whole.choices[0].text == pieces == text(**options)
    kept = {key: value for key, value in options.items() if key in ("do_sample", "temperature")}
    assert pieces != text(**kept)


def test_logprobs_are_of_penalised_scores(served: Any, client: openai.OpenAI) -> None:
    """As those of OpenAI: a bias shows in them, temperature does not."""
    arguments: Any = {"model": MODEL_ID, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 0}
    bias = {"9": 100}
    found = client.completions.create(logit_bias=bias, presence_penalty=0.5, **arguments).choices[0]
    assert found.text.split() == ["w6"] * 4 and found.logprobs is not None
    assert found.logprobs.token_logprobs is not None and min(found.logprobs.token_logprobs) > -1e-6


def test_penalties_do_not_count_the_prompt() -> None:
    """Only what came after it, and each time."""
    scores = torch.zeros(1, 6)
    found = CountPenalties(3, presence=0.5, frequency=0.25)(torch.tensor([[1, 1, 2, 3, 3, 4]]), scores)
    assert found.tolist() == [[0, 0, 0, -1.0, -0.75, 0]] and not scores.any()
