"""The server under bad input, crowds, clients that leave, requests that fail, signals. It lives, and stays right."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fake_heads import FakeHeads
from serving import MODEL_ID, running, until
from typer.testing import CliRunner

from runtime import SpeculationBounds, detach, save_adapter
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.server.answers import Answer
from runtime.server.limits import Limits
from runtime.server.worker import Worker
from train.cli import app

PROMPT = [20, 63, 6]
LIMITS = Limits(max_tokens=200, max_body_bytes=20_000, max_waiting=2)


class Valve(FakeHeads):
    """Random drafts, made only while it is open; fails on request."""

    def __init__(self) -> None:
        super().__init__("random", [2, 4], vocabulary=128)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.failing = False

    def propose(self, *args: Any) -> tuple[int, float]:
        """Wait, then draft."""
        self.reached.set()
        assert self.open.wait(120)
        if self.failing:
            self.failing = False
            raise RuntimeError("a secret of the inside")
        return super().propose(*args)


class Served:
    """A server whose drafting the test can hold."""

    def __init__(self, url: str, worker: Worker, model: Any, valve: Valve) -> None:
        self.url, self.worker, self.model, self.valve = url, worker, model, valve
        self.port = int(url.rpartition(":")[2])
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def complete(self, **options: Any) -> Any:
        """A completion of the prompt."""
        return self.client.completions.create(**{"model": MODEL_ID, "prompt": PROMPT, "max_tokens": 8} | options)

    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return self.worker._running is None and not self.worker.num_waiting

    def hold(self) -> None:
        """Keep the next request at its first draft."""
        self.valve.reached.clear()
        self.valve.open.clear()

    def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def send(self, **body: Any) -> socket.socket:
        """A request whose answer is not read."""
        raw = json.dumps({"model": MODEL_ID, "prompt": PROMPT} | body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection


@pytest.fixture(scope="module")
def text(make_model: Any, make_tokenizer: Any) -> str:
    """What stock answers with 8 tokens."""
    ids = make_model().generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, 3:]
    found: str = make_tokenizer().decode(ids, skip_special_tokens=True)
    return found


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    model, valve = make_model(), Valve()
    attach(model, SpecBound(model, valve, SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, make_tokenizer()), limits=LIMITS) as (url, worker):
        yield Served(url, worker, model, valve)
        valve.open.set()
    detach(model)


GOOD: dict[str, Any] = {"model": MODEL_ID, "prompt": "w1"}
CHAT: dict[str, Any] = {"model": MODEL_ID, "messages": [{"role": "user", "content": "w1"}]}


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


def test_what_changes_nothing_is_taken(served: Served, text: str) -> None:
    neutral: Any = {"n": 1, "logprobs": None, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "user": "me"}
    assert served.complete(**neutral).choices[0].text == text


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
    job = served.worker._running
    assert job is not None
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
        job = served.worker._running
    assert job is not None
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
    waiting = served.send(max_tokens=200)  # behind the held one: its time runs too
    assert b" 504 " in waiting.recv(100)
    waiting.close()
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


def test_health_while_loading_and_the_key(make_model: Any, make_tokenizer: Any) -> None:
    loaded, model = threading.Event(), make_model()
    attach(model, SpecBound(model, FakeHeads("random", [2], vocabulary=128), SpeculationBounds(0.2, 2, 4)))

    def load() -> tuple[Any, Any]:
        loaded.wait(60)
        model.specbound.prepare(model)
        return model, make_tokenizer()

    def health() -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=60)
        connection.request("GET", "/health")
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found

    with running(load, wait=False, api_key="s3cret") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0)
        assert health() == (503, {"status": "loading"})
        with pytest.raises(openai.InternalServerError, match="the model is loading") as caught:
            client.completions.create(model=MODEL_ID, prompt="w1")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
        loaded.set()
        until(lambda: health()[0] == 200)
        assert "bit for bit equal" in health()[1]["certificate"]
        assert client.completions.create(model=MODEL_ID, prompt="w1").choices[0].text
        for wrong in ("other", "s3cre"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client.with_options(api_key=wrong).models.list()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/metrics")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: Any, make_model: Any, make_adapter: Any, tiny_base: Path) -> Path:
    folder: Path = tmp_path_factory.mktemp("served") / "adapter"
    save_adapter(make_adapter(make_model(), base_model_name_or_path=str(tiny_base)), folder)
    return folder


def test_sigterm(adapter: Path, tmp_path: Path) -> None:
    """The process itself: the stream that runs is finished, what waits is refused, nothing new comes in, exit 0.

    The adapter is damaged while it serves: it goes on, having read all that it needs.
    """
    adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    command = [
        sys.executable,
        "-m",
        "train.cli",
        "serve",
        "--adapter",
        str(adapter),
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        assert said.startswith("serving base on http://127.0.0.1:")
        url = said.split()[3].rstrip(",")
        assert process.stderr.readline().startswith("ready: bit for bit equal")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=3)
        for path in adapter.iterdir():
            path.write_bytes(b"broken")
        arguments: Any = {"model": "base", "prompt": PROMPT, "max_tokens": 500, "stream": True}
        stream = client.completions.create(**arguments)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and rest[-1].id == first.id
        assert process.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            client.with_options(max_retries=0).models.list()
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_what_waits_is_refused_when_the_server_stops(served: Served, text: str) -> None:
    """Last of its server: drained, it takes nothing more."""
    served.hold()
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(served.complete().choices[0].text)
        except openai.InternalServerError as error:
            found.append(error.status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    until(served.valve.reached.is_set)
    threads[1].start()
    until(lambda: served.worker.num_waiting == 1)
    served.worker.drain()
    threads[1].join(60)
    assert found == [503]
    served.valve.open.set()
    threads[0].join(60)
    assert found == [503, text]
    with pytest.raises(openai.InternalServerError, match="draining"):
        served.complete()


def test_serve_says_what_is_wrong(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["serve", "--adapter", str(adapter), *arguments])
        assert result.exit_code == 1 and result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
        return result.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in fails("--port", str(taken.getsockname()[1]))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert "set an API key" in fails("--host", host)
    assert "cannot be bound" in fails("--host", "192.0.2.1", "--api-key", "k")
    assert "could not be loaded" in fails("--port", "0", "--model", str(tmp_path))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for module in [name for name in sys.modules if name.startswith("runtime.server")]:
        monkeypatch.delitem(sys.modules, module)
    assert "pip install 'specbound[serve]'" in fails()
