"""Keys and values within a stated memory: who waits for room, who is refused; and what the metrics tell of it."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from runtime.batch.memory import bytes_per_token
from runtime.server.request.limits import Limits
from tests.helpers.servers import MODEL_ID, PROMPT, TEMPLATE, Served, held, stock_text, until

ROOM = 40
BESIDE = 5  # a round's drafts and its newest token


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
        assert told["max_running"] == 3 and told["kv_tokens"] == 3 * 512


def test_requests_wait_for_room(served: Served) -> None:
    """The second for the first, the third, which would have room, behind it; all are stock's."""
    served.hold()
    with ThreadPoolExecutor(3) as pool:
        try:
            asked = [pool.submit(served.complete, max_tokens=20, temperature=0)]
            until(served.valve.reached.is_set)
            for number, tokens in enumerate((21, 1), start=1):
                asked.append(pool.submit(served.complete, max_tokens=tokens, temperature=0))
                until(lambda number=number: served.worker.num_waiting == number)
            found = served.metrics()
        finally:
            served.valve.open.set()
        answers = [each.result() for each in asked]
    assert found["specbound_num_requests_running"] == 1 and found["specbound_num_requests_waiting"] == 2
    assert found["specbound_kv_cache_usage_perc"] == (len(PROMPT) + 20 + BESIDE) / ROOM
    assert [each.usage.completion_tokens for each in answers] == [20, 21, 1]
    until(served.idle)
    begins = stock_text(served.model, served.worker.tokenizer)
    assert [each.choices[0].text.startswith(begins) for each in answers] == [True, True, False]
    assert served.metrics()["specbound_kv_cache_usage_perc"] == 0


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
