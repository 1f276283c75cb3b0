"""What the server is asked: bad requests in OpenAI's form, what changes nothing, names of others, what is counted."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.servers import MODEL_ID, Served, held, until

GOOD: dict[str, Any] = {"model": MODEL_ID, "prompt": "w1"}
CHAT: dict[str, Any] = {"model": MODEL_ID, "messages": [{"role": "user", "content": "w1"}]}


def said(fields: dict[str, Any]) -> dict[str, Any]:
    """A chat of one message with these fields."""
    return CHAT | {"messages": [CHAT["messages"][0] | fields]}


def nested(levels: int) -> dict[str, Any]:
    """Objects in one another."""
    found: dict[str, Any] = {}
    for _ in range(levels - 1):
        found = {"a": found}
    return found


def called(arguments: Any) -> dict[str, Any]:
    """A chat after a call with these arguments."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": text}}
    return CHAT | {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]}


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
        ("completions", b"[]", 400, "body: must be a JSON object"),
        ("completions", b'{"a":' * 3000 + b"1" + b"}" * 3000, 400, "body: is nested deeper than the 100 levels"),
        ("completions", GOOD | {"metadata": nested(101)}, 400, "body: is nested deeper than the 100 levels"),
        ("chat/completions", CHAT | {"chat_template_kwargs": nested(300)}, 400, "nested deeper"),
        ("responses", {"model": MODEL_ID, "input": "w1", "text": {"format": nested(300)}}, 400, "nested deeper"),
        ("responses", {"model": MODEL_ID, "input": [{"type": {}}]}, 400, "input: an item of type {} is not supported"),
        ("responses", {"model": MODEL_ID, "input": "w1", "stop": [1]}, 400, "stop: must be a string or a list of"),
        ("chat/completions", called(nested(300)), 400, "arguments: is nested deeper than the 100 levels"),
        ("chat/completions", called('{"a":' * 2500), 400, "arguments: is nested deeper than the 100 levels"),
        ("completions", b"x" * 20_001, 413, "larger than 20000 bytes"),
        ("completions", {}, 400, "model"),
        ("completions", GOOD | {"model": "gpt"}, 404, "'tiny' only"),
        ("completions", GOOD | {"model": "../tiny"}, 404, "'tiny' only"),
        ("completions", GOOD | {"model": "a\r\nX-Bad: 1"}, 404, "'tiny' only"),
        ("completions", GOOD | {"prompt": ""}, 400, "at least one token"),
        ("completions", GOOD | {"prompt": []}, 400, "prompt"),
        ("completions", GOOD | {"prompt": [1, 128]}, 400, "from 0 to 127"),
        ("completions", GOOD | {"prompt": [-1]}, 400, "from 0 to 127"),
        ("completions", GOOD | {"prompt": ["w1", ""]}, 400, "at least one token"),
        ("completions", GOOD | {"prompt": [1, "w1"]}, 400, "prompt: must be a text, a list of token ids, or"),
        ("completions", GOOD | {"prompt": [True]}, 400, "prompt: must be a text, a list of token ids, or"),
        ("completions", GOOD | {"prompt": {"a": 1}}, 400, "prompt"),
        ("completions", GOOD | {"colour": "red"}, 400, "colour: this server does not know this field"),
        ("completions", GOOD | {"max_tokens": 0}, 400, "max_tokens: 0 needs echo: true"),
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
        (
            "completions",
            GOOD | {"stop": ["a"] * 17},
            400,
            "stop: 17 strings are too many: this server takes",
        ),
        ("completions", GOOD | {"stop": [1]}, 400, "stop: must be a string or a list of strings"),
        ("completions", GOOD | {"n": 0}, 400, "n"),
        ("completions", GOOD | {"n": 129}, 400, "n: must be less than or equal to 128"),
        (
            "completions",
            GOOD | {"n": 100, "prompt": ["w1"] * 11},
            400,
            "100 answers to each of 11 prompts: this server",
        ),
        ("completions", GOOD | {"logprobs": 21}, 400, "logprobs"),
        ("completions", GOOD | {"logprobs": True}, 400, "logprobs"),
        ("completions", GOOD | {"presence_penalty": 2.5}, 400, "presence_penalty"),
        ("completions", GOOD | {"frequency_penalty": "1"}, 400, "frequency_penalty"),
        ("completions", GOOD | {"min_p": 1.5}, 400, "min_p"),
        ("completions", GOOD | {"repetition_penalty": 0}, 400, "repetition_penalty"),
        ("completions", GOOD | {"top_k": -2}, 400, "top_k"),
        ("completions", GOOD | {"logit_bias": {"5": 101}}, 400, "from -100 to 100"),
        ("completions", GOOD | {"logit_bias": {"w5": 1}}, 400, "logit_bias: must give token ids"),
        ("completions", GOOD | {"logit_bias": {"9" * 5000: 1}}, 400, "logit_bias: must give token ids"),
        ("completions", GOOD | {"logit_bias": {"128": 1}}, 400, "128 is no token id: they end at 127"),
        ("completions", GOOD | {"stream_options": {"include_obfuscation": True}}, 400, "not supported"),
        ("completions", GOOD | {"messages": []}, 400, "messages: this server does not know this field"),
        ("completions", GOOD | {"specbound": {"enabled": 1}}, 400, "specbound.enabled"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "w1"}]}, 400, "role"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "content"),
        ("chat/completions", CHAT | {"messages": ["w1"]}, 400, "messages.0: must be an object with a role"),
        (
            "chat/completions",
            said({"content": [{"type": "image_url"}]}),
            400,
            "content: a part of type image_url",
        ),
        ("chat/completions", said({"content": [{"type": "text"}]}), 400, "content: a part without text"),
        ("chat/completions", said({"content": 5}), 400, "messages.0.content: must be text, or a list of parts"),
        ("chat/completions", said({"content": None}), 400, "messages.0: content is missing: give text"),
        ("chat/completions", said({"tool_calls": [{}]}), 400, "messages.0: tool_calls belongs to"),
        ("chat/completions", said({"function_call": {}} | {"audio": {"id": "a"}}), 400, "messages.0: audio is not"),
        ("chat/completions", said({"role": "function"}), 400, "messages.0.role"),
        ("chat/completions", CHAT | {"continue_final_message": True}, 400, "needs a last message of the assistant"),
        ("chat/completions", CHAT | {"echo": True}, 400, "echo is not supported"),
        ("chat/completions", CHAT | {"logprobs": 1}, 400, "logprobs"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools.0.function: is missing: give it"),
        ("completions", GOOD | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ("completions", GOOD | {"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
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


def test_a_body_of_another_type_is_told_which(served: Served) -> None:
    """As `curl -d` sends it."""
    header = {"Content-Type": "application/x-www-form-urlencoded"}
    status, answer = served.post(json.dumps(GOOD).encode(), **header)
    assert status == 400 and "with the header Content-Type: application/json" in answer["error"]["message"]
    assert served.post(json.dumps(GOOD | {"metadata": nested(99)}).encode())[0] == 200


def test_metrics(served: Served) -> None:
    """Counts go up by what a request did, and never down."""
    before = served.metrics()
    usage = served.complete(max_tokens=20).usage
    after = served.metrics()
    assert all(after[name] >= value for name, value in before.items() if "created" not in name)
    assert after["specbound_generation_tokens_total"] - before["specbound_generation_tokens_total"] == 20
    assert after["specbound_prompt_tokens_total"] - before["specbound_prompt_tokens_total"] == 3
    assert after["specbound_rounds_total"] - before["specbound_rounds_total"] == usage.specbound["rounds"]
    resting = after["specbound_resting_rounds_total"] - before["specbound_resting_rounds_total"]
    assert resting == usage.specbound["resting_rounds"]
    assert after["specbound_ready"] == 1 and after["specbound_num_requests_waiting"] == 0
    drafted = 'specbound_drafted_tokens_total{exit_layer="2"}'
    assert after[drafted] - before.get(drafted, 0) == usage.specbound["drafted"]["2"]
    ended = 'specbound_requests_total{outcome="length"}'
    assert after[ended] - before.get(ended, 0) == 1


def test_metrics_of_refused_requests(served: Served) -> None:
    """Whoever refuses: the schema, the limits, the gate; a request elsewhere is none."""
    refused = 'specbound_requests_total{outcome="refused"}'
    before = served.metrics().get(refused, 0)
    for body in (b"{", json.dumps(GOOD | {"n": 129}).encode(), b"x" * 20_001):
        served.post(body)
    served.post(json.dumps(GOOD).encode(), Host="evil.example")
    served.post(b"{}", "/tokenize")
    assert served.metrics()[refused] - before == 4


def test_metrics_of_cancelled_requests(served: Served) -> None:
    """What they took of the machine counts; and what runs is told."""
    before = served.metrics()
    served.hold()
    with served.send(max_tokens=200, stream=True) as connection:
        until(served.valve.reached.is_set)
        assert served.metrics()["specbound_num_requests_running"] == 1
        (job,) = served.worker._running.values()
        assert job is not None and connection.recv(12) == b"HTTP/1.1 200"
    until(job.transcript.cancelled.is_set)
    served.valve.open.set()
    until(served.idle)
    after = served.metrics()
    assert after["specbound_num_requests_running"] == 0
    for name, count in (("generation_tokens", len(job.transcript.ids)), ("rounds", 1), ("prompt_tokens", 3)):
        assert after[f"specbound_{name}_total"] - before[f"specbound_{name}_total"] == count
    cancelled = 'specbound_requests_total{outcome="cancelled"}'
    assert after[cancelled] - before.get(cancelled, 0) == 1
