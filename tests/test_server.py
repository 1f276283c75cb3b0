"""The server as the real `openai` client sees it: its text is stock `generate`'s, streamed or whole."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from fake_heads import FakeHeads
from serving import MODEL_ID, running

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound

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
