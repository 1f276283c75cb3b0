"""Keys and values in so many KV blocks: who waits, who is refused, who is put out; and what the metrics tell."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from runtime.batch import Call
from runtime.batch.admission import Admission
from runtime.batch.generation import Generation
from runtime.batch.memory import bytes_per_token
from runtime.server.request.limits import Limits
from tests.helpers.pools.tight import small_blocks
from tests.helpers.servers import MODEL_ID, PROMPT, TEMPLATE, Served, held, stock_text, until

BLOCK, ROOM = 8, 40
BESIDE = 5  # a round's drafts and its newest token


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """KV blocks of a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, BLOCK)
        yield


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    """Room for the keys and values of so many tokens; drafts that can be held."""
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with held(model, tokenizer, Limits(max_running=4), ROOM * bytes_per_token(model)) as found:
        yield found


def test_what_never_has_room_is_refused(served: Served) -> None:
    """By name, with 400; a chat without a limit is as long as there is room for."""
    with pytest.raises(openai.BadRequestError) as caught:
        served.complete(max_tokens=ROOM)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"
    assert f"of {len(PROMPT) + ROOM + BESIDE} tokens: keys and values have room for {ROOM}" in str(caught.value)
    answer = served.client.chat.completions.create(model=MODEL_ID, messages=[{"role": "user", "content": "w1 w2"}])
    assert answer.usage is not None and answer.usage.total_tokens == ROOM - BESIDE
    with pytest.raises(openai.BadRequestError):
        content = " ".join(["w1"] * ROOM)
        served.client.chat.completions.create(model=MODEL_ID, messages=[{"role": "user", "content": content}])
    until(served.idle)
    assert served.metrics()["specbound_kv_cache_usage_perc"] == 0


def test_how_many_run_is_chosen_and_told(make_model: Any, make_tokenizer: Any) -> None:
    """From memory, where nobody says; /health tells it."""
    model = make_model()
    with held(model, make_tokenizer(), Limits(max_running=None), 3 * 512 * bytes_per_token(model)) as found:
        assert found.worker.max_running == 3 and len(found.complete(prompt=[PROMPT] * 4).choices) == 4
        told = json.loads(urllib.request.urlopen(f"{found.url}/health").read())
        assert told["max_running"] == 3 and told["kv_tokens"] == 3 * 512 == BLOCK * told["kv_blocks"]
        assert found.metrics()["specbound_kv_blocks"] == told["kv_blocks"]


def at_once(served: Served, bodies: list[dict[str, Any]]) -> tuple[list[Any], dict[str, float]]:
    """Answers to requests, the others sent while the first one is held; and what the metrics told then."""
    served.hold()
    with ThreadPoolExecutor(len(bodies)) as pool:
        try:
            asked = [pool.submit(served.complete, **bodies[0], temperature=0)]
            until(served.valve.reached.is_set)
            for number, body in enumerate(bodies[1:], start=1):
                asked.append(pool.submit(served.complete, **body, temperature=0))
                until(lambda number=number: served.worker.num_waiting == number)
            found = served.metrics()
        finally:
            served.valve.open.set()
        answers = [each.result() for each in asked]
    until(served.idle)
    return answers, found


def test_requests_wait_for_room(served: Served) -> None:
    """The second, of a long prompt, for the first; the third, which would have room, behind it."""
    before = served.metrics()["specbound_num_preemptions_total"]
    bodies = [{"max_tokens": 20}, {"prompt": PROMPT * 7, "max_tokens": 10}, {"max_tokens": 1}]
    answers, found = at_once(served, bodies)
    assert found["specbound_num_requests_running"] == 1 and found["specbound_num_requests_waiting"] == 2
    assert found["specbound_kv_cache_usage_perc"] == 2 / 5 and found["specbound_kv_blocks_used"] == 2
    assert [each.usage.completion_tokens for each in answers] == [20, 10, 1]
    begins = stock_text(served.model, served.worker.tokenizer)
    assert answers[0].choices[0].text.startswith(begins) and begins.startswith(answers[2].choices[0].text)
    after = served.metrics()
    assert after["specbound_kv_cache_usage_perc"] == 0 and after["specbound_num_preemptions_total"] == before


def test_one_is_put_out_and_resumed(served: Served) -> None:
    """Two that begin together and grow to all there is, each: both have the text that one alone has."""
    alone = served.complete(max_tokens=30, temperature=0).choices[0].text
    before = served.metrics()["specbound_num_preemptions_total"]
    answers, _ = at_once(served, [{"max_tokens": 30}, {"max_tokens": 30}])
    assert [each.choices[0].text for each in answers] == [alone, alone]
    assert [each.usage.completion_tokens for each in answers] == [30, 30]
    after = served.metrics()
    assert after["specbound_num_preemptions_total"] > before and after["specbound_kv_blocks_used"] == 0
    assert after["specbound_kv_blocks"] == ROOM / BLOCK


def test_one_that_is_cancelled_while_it_is_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends before it would be resumed."""
    grow, resumed = Admission.grow, []

    def watched(self: Admission, *given: Any) -> list[Call]:
        put_out = grow(self, *given)
        for call in put_out:
            served.worker.cancel(served.worker._running[call])
        return put_out

    monkeypatch.setattr(Admission, "grow", watched)
    monkeypatch.setattr(Generation, "resume", lambda self, *given: resumed.append(self))
    answers, _ = at_once(served, [{"max_tokens": 30}, {"max_tokens": 30}])
    assert [each.usage.completion_tokens == 30 for each in answers] == [True, False] and not resumed
    assert served.metrics()["specbound_kv_blocks_used"] == 0


def test_latencies_rows_and_prompts_are_counted(served: Served) -> None:
    """By what one request did; its prompt was read before."""
    served.complete(max_tokens=2)
    before = served.metrics()
    usage = served.complete(max_tokens=20).usage.specbound
    until(served.idle)
    after = served.metrics()

    def grown(name: str) -> float:
        return after[f"specbound_{name}"] - before[f"specbound_{name}"]

    assert grown("inter_token_latency_seconds_count") == 19 and grown("time_to_first_token_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_count") == 1
    assert grown("iteration_tokens_total_count") == usage["rounds"]
    assert grown("iteration_tokens_total_sum") == usage["rounds"] + sum(usage["drafted"].values())
    assert grown("prefix_cache_queries_total") == grown("prefix_cache_hits_total") == len(PROMPT)
