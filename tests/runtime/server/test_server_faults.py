"""The server under crowds, clients that leave, requests that fail or take too long. It lives, and stays right."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from runtime.server.answer.answer import Answer
from tests.helpers.servers import Served, held, stock_text, until


@pytest.fixture(scope="module")
def text(make_model: Any, make_tokenizer: Any) -> str:
    return stock_text(make_model(), make_tokenizer())


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    with held(make_model(), make_tokenizer()) as found:
        yield found


def test_a_full_queue(served: Served, text: str) -> None:
    """One runs, two wait, the fourth is told when to come again; the three get their answers."""
    served.hold()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(served.complete().choices[0].text)) for _ in range(3)]
    for index, thread in enumerate(threads):
        thread.start()
        until(lambda: served.valve.reached.is_set() and served.worker.num_waiting == index)  # noqa: B023
    with pytest.raises(openai.RateLimitError, match="2 requests are waiting") as caught:
        served.complete()
    assert int(caught.value.response.headers["retry-after"]) >= 1
    served.valve.open.set()
    for thread in threads:
        thread.join(60)
    assert found == [text] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave(served: Served, text: str, stream: bool) -> None:
    """The one that runs ends at its next token, the one that waits leaves the queue."""
    served.hold()
    first = served.send(max_tokens=200, stream=stream)
    until(served.valve.reached.is_set)
    (job,) = served.worker._running.values()
    second = served.send(stream=stream)
    until(lambda: served.worker.num_waiting == 1)
    second.close()
    until(lambda: served.worker.num_waiting == 0)
    first.close()
    until(job.transcript.cancelled.is_set)
    served.valve.open.set()
    until(served.idle)
    assert len(job.transcript.ids) <= 7  # the prompt's, and the round that was held
    assert served.complete().choices[0].text == text


def test_the_client_closes_a_stream(served: Served) -> None:
    served.hold()
    with served.complete(stream=True, max_tokens=200) as stream:
        assert next(iter(stream)).choices[0].text
        (job,) = served.worker._running.values()
    until(job.transcript.cancelled.is_set)
    served.valve.open.set()
    until(served.idle)
    assert len(job.transcript.ids) <= 7


def test_half_a_request_holds_nobody(served: Served, text: str) -> None:
    """A client that never sends the rest, and one that never reads."""
    half = socket.create_connection(("127.0.0.1", served.port))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    with half, served.send(max_tokens=200, stream=True):
        assert served.complete().choices[0].text == text


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long(
    served: Served, text: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended and answered 504, the queue included; the next one is answered."""
    until(served.idle)
    monkeypatch.setattr(Answer, "submit", hurried(Answer.submit))
    served.hold()
    with pytest.raises(openai.APIError, match=r"not done within 0\.3 s") as caught:
        list(served.complete(stream=True, max_tokens=200)) if stream else served.complete(max_tokens=200)
    body: Any = caught.value.body
    assert (body["type"], body["code"]) == ("server_error", "timeout")
    if not stream:
        assert isinstance(caught.value, openai.APIStatusError) and caught.value.status_code == 504
    with served.send(max_tokens=200, stream=stream) as waiting:  # behind the held one: its time runs too
        assert b" 504 " in waiting.recv(100)  # also of a stream, which has sent nothing while it waits
    monkeypatch.undo()
    served.valve.open.set()
    until(served.idle)
    assert served.complete().choices[0].text == text


def hurried(submit: Any) -> Any:
    """`Answer.submit` of an answer that has 0.3 seconds."""

    def run(answer: Answer) -> None:
        answer.seconds = 0.3
        submit(answer)

    return run


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_fails_fails_alone(served: Served, text: str, stream: bool) -> None:
    served.complete()  # and so nothing of the requests before is running
    served.valve.failing = True
    with pytest.raises(openai.APIError, match=r"the request failed \(RuntimeError\)") as caught:
        list(served.complete(stream=True)) if stream else served.complete()
    assert "secret" not in str(caught.value.body)
    assert served.complete().choices[0].text == text


def test_what_waits_is_refused_when_the_server_stops(served: Served, text: str) -> None:
    """Streamed or not: nothing of it was sent yet. Last of its server: drained, it takes nothing more."""
    served.hold()
    found: list[Any] = []

    def ask(stream: bool) -> None:
        try:
            answer = served.complete(stream=stream)
            found.append(answer.choices[0].text)
        except openai.InternalServerError as error:
            found.append(error.status_code)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, False, True)]
    for index, thread in enumerate(threads):
        thread.start()
        until(lambda: served.valve.reached.is_set() and served.worker.num_waiting == index)  # noqa: B023
    served.worker.drain()
    for thread in threads[1:]:
        thread.join(60)
    assert found == [503, 503]
    served.valve.open.set()
    threads[0].join(60)
    assert found == [503, 503, text]
    with pytest.raises(openai.InternalServerError, match="draining"):
        served.complete()
