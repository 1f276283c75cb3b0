"""Bodies as other clients send them, shortened, and what each of them reads from the answer."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.servers import MODEL_ID, PROMPT, TEMPLATE, Served, held, stock_text

# By client: its route, and its body without what all have.
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "langchain-openai": ("chat/completions", {"messages": [{"content": "w17 w60", "role": "user"}], "stream": False}),
    "langchain-openai, stream": (
        "chat/completions",
        {
            "messages": [{"content": "w17 w60", "role": "user"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "langchain-openai, after a call": (
        "chat/completions",
        {
            "messages": [
                {"content": "w17", "role": "user"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "id": "a", "function": {"name": "f", "arguments": '{"city": "w3"}'}}
                    ],
                },
                {"content": [{"type": "text", "text": "w9"}], "role": "tool", "tool_call_id": "a"},
            ]
        },
    ),
    "langchain-openai, completions of which the best are all": (
        "completions",
        {
            "prompt": ["w17"],
            "n": 2,
            "best_of": 2,
            "seed": 3,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "top_p": 1,
        },
    ),
    "litellm": (
        "chat/completions",
        {
            "messages": [
                {"role": "user", "content": "w17"},
                {"content": "w5", "role": "assistant", "tool_calls": None, "function_call": None},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "w1", "cache_control": {"type": "ephemeral"}}],
                },
            ],
            "n": 2,
            "logit_bias": {"5": 1},
            "user": "u",
        },
    ),
    "llm": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "w17"}], "stream": True, "stream_options": {"include_usage": True}},
    ),
    "llm, completions": ("completions", {"prompt": "w17", "stream": True}),
    "lm-eval, local-chat-completions": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "w17"}], "stop": ["\n", "Question"], "seed": 1234},
    ),
    "lm-eval, local-completions, ids": (
        "completions",
        {
            "prompt": [[20, 63], [20, 63], [5, 6]],
            "stop": ["\n", "</s>"],
            "seed": 1234,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    ),
}


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    from runtime.server.request.limits import Limits

    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% for message in messages %}{{ message.tool_calls }}{% endfor %}"
    with held(make_model(), tokenizer, Limits()) as found:
        yield found


@pytest.mark.parametrize("client", BODIES)
def test_they_are_answered(served: Served, client: str) -> None:
    """Each choice is there, and a stream ends."""
    path, fields = BODIES[client]
    body = {"model": MODEL_ID, "max_tokens": 4} | fields
    status, told, text = served.ask(json.dumps(body).encode(), f"/v1/{path}")
    assert status == 200, text
    if fields.get("stream"):
        assert told == "text/event-stream; charset=utf-8" and text.endswith("data: [DONE]\n\n")
    else:
        prompts = fields.get("prompt", "")
        count = fields.get("n", 1) * (len(prompts) if isinstance(prompts, list) else 1)
        assert [choice["index"] for choice in json.loads(text)["choices"]] == list(range(count))


def test_the_best_of_as_many_are_all(served: Served) -> None:
    """`best_of` that equals `n` leaves none out; another is refused."""
    body = {"model": MODEL_ID, "prompt": PROMPT, "max_tokens": 8, "n": 2, "temperature": 0}
    status, answer = served.post(json.dumps(body | {"best_of": 2}).encode())
    expected = stock_text(served.model, served.worker.tokenizer)
    assert status == 200 and [choice["text"] for choice in answer["choices"]] == [expected] * 2
    for wrong in ({"best_of": 3}, {"best_of": True, "n": 1}, {"best_of": 2, "n": 1}, {"best_of": 2, "n": None}):
        status, answer = served.post(json.dumps(body | wrong).encode())
        assert status == 400 and "best_of is not supported" in answer["error"]["message"]


@torch.no_grad()
def test_loglikelihoods_as_lm_eval_reads_them(served: Served) -> None:
    """Several prompts of ids: the sum over the continuation is that of the model's own forward; greedy where it is."""
    contexts = [[20, 63, 6], [5, 9], [20, 63, 6]]
    best = int(served.model(torch.tensor([contexts[0]])).logits[0, -1].argmax())
    continuations = [[best], [7, 8, 9], [best + 1 if best < 100 else 3]]
    prompts = [context + rest for context, rest in zip(contexts, continuations, strict=True)]
    body = {"model": MODEL_ID, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    status, answer = served.post(json.dumps(body | {"echo": True}).encode())
    assert status == 200 and len(answer["choices"]) == 3
    for choice, context, prompt in zip(answer["choices"], contexts, prompts, strict=True):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(prompt) + 1
        values = torch.log_softmax(served.model(torch.tensor([prompt])).logits[0], dim=-1)
        places = range(len(context), len(prompt))
        expected = sum(float(values[place - 1, prompt[place]]) for place in places)
        assert sum(told["token_logprobs"][len(context) : -1]) == pytest.approx(expected, abs=1e-5)
        greedy = all(int(values[place - 1].argmax()) == prompt[place] for place in places)
        tokens, tops = (told[name][len(context) : -1] for name in ("tokens", "top_logprobs"))
        read = all(
            token == max(top.items(), key=lambda pair: pair[1])[0] for token, top in zip(tokens, tops, strict=True)
        )
        assert read == greedy
