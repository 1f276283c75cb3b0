"""What the server is asked: bad requests in OpenAI's form, what changes nothing, names of others, what is counted."""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.servers import MODEL_ID, Served, held, stock_text

GOOD: dict[str, Any] = {"model": MODEL_ID, "prompt": "w1"}
CHAT: dict[str, Any] = {"model": MODEL_ID, "messages": [{"role": "user", "content": "w1"}]}


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    with held(make_model(), make_tokenizer()) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("completions", b"{", 400, "body"),
        ("completions", b"", 400, ""),
        ("completions", b"\xff\xfe", 400, ""),
        ("completions", b"[" * 9000, 400, ""),
        ("completions", b"[]", 400, ""),
        ("completions", b"x" * 20_001, 413, "larger than 20000 bytes"),
        ("completions", {}, 400, "model"),
        ("completions", GOOD | {"model": "gpt"}, 404, "'tiny' only"),
        ("completions", GOOD | {"model": "../tiny"}, 404, "'tiny' only"),
        ("completions", GOOD | {"model": "a\r\nX-Bad: 1"}, 404, "'tiny' only"),
        ("completions", GOOD | {"prompt": ""}, 400, "at least one token"),
        ("completions", GOOD | {"prompt": []}, 400, "prompt"),
        ("completions", GOOD | {"prompt": [1, 128]}, 400, "from 0 to 127"),
        ("completions", GOOD | {"prompt": [-1]}, 400, "from 0 to 127"),
        ("completions", GOOD | {"prompt": ["w1", "w2"]}, 400, "prompt"),
        ("completions", GOOD | {"prompt": {"a": 1}}, 400, "prompt"),
        ("completions", GOOD | {"colour": "red"}, 400, "colour"),
        ("completions", GOOD | {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", GOOD | {"max_tokens": "5"}, 400, "max_tokens"),
        ("completions", GOOD | {"max_tokens": 201}, 400, "at most 200"),
        ("completions", GOOD | {"max_tokens": 10**30}, 400, "context is 512"),
        ("completions", GOOD | {"prompt": [5] * 510}, 400, "context is 512"),
        ("completions", GOOD | {"temperature": -1}, 400, "temperature"),
        ("completions", GOOD | {"temperature": 1e-9}, 400, "at least 1e-06"),
        ("completions", b'{"model": "tiny", "prompt": "w1", "temperature": NaN}', 400, "temperature"),
        ("completions", GOOD | {"top_p": 0}, 400, "top_p"),
        ("completions", GOOD | {"seed": 2**64}, 400, "seed"),
        ("completions", GOOD | {"stop": ""}, 400, "stop"),
        ("completions", GOOD | {"stop": ["a"] * 17}, 400, "stop"),
        ("completions", GOOD | {"n": 2}, 400, "not supported"),
        ("completions", GOOD | {"logprobs": 21}, 400, "logprobs"),
        ("completions", GOOD | {"logprobs": True}, 400, "logprobs"),
        ("completions", GOOD | {"echo": True}, 400, "not supported"),
        ("completions", GOOD | {"presence_penalty": 0.5}, 400, "not supported"),
        ("completions", GOOD | {"specbound": {"enabled": 1}}, 400, "specbound.enabled"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "w1"}]}, 400, "role"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "content"),
        ("chat/completions", CHAT | {"messages": ["w1"]}, 400, "messages.0"),
        ("chat/completions", CHAT | {"logprobs": 1}, 400, "logprobs"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "not supported"),
        ("chat/completions", CHAT, 400, "no chat template"),
        ("nothing", GOOD, 404, "/v1/nothing"),
        ("models", GOOD, 405, "/v1/models"),
    ],
)
def test_bad_requests(served: Served, path: str, body: Any, status: int, said: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer = served.post(raw, f"/v1/{path}")
    assert found == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert said in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(served: Served, make_model: Any, make_tokenizer: Any) -> None:
    neutral: Any = {"n": 1, "logprobs": None, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "user": "me"}
    assert served.complete(**neutral).choices[0].text == stock_text(make_model(), make_tokenizer())


def test_metrics(served: Served) -> None:
    """Counts go up by what a request did, and never down."""

    def read() -> dict[str, float]:
        page = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
        pairs = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    before = read()
    usage = served.complete(max_tokens=20).usage
    after = read()
    assert all(after[name] >= value for name, value in before.items() if "created" not in name)
    assert after["specbound_generated_tokens_total"] - before["specbound_generated_tokens_total"] == 20
    assert after["specbound_prompt_tokens_total"] - before["specbound_prompt_tokens_total"] == 3
    assert after["specbound_rounds_total"] - before["specbound_rounds_total"] == usage.specbound["rounds"]
    assert after["specbound_ready"] == 1 and after["specbound_waiting_requests"] == 0
    drafted = 'specbound_drafted_tokens_total{exit_layer="2"}'
    assert after[drafted] - before[drafted] == usage.specbound["drafted"]["2"]
    ended = 'specbound_requests_total{outcome="length"}'
    assert after[ended] - before[ended] == 1


def test_names_of_others_are_not_answered_to(served: Served) -> None:
    """A page elsewhere that has its own name lead to this machine gets nothing."""
    status, answer = served.post(json.dumps(GOOD).encode(), Host="evil.example")
    assert status == 403 and "local names" in answer["error"]["message"]
