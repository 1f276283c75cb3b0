"""A server of a tiny model in this process, for the tests that talk to it."""

import http.client
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai
import torch
import uvicorn

from runtime import SpeculationBounds, detach
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.server.app import make_app
from runtime.server.request.limits import Limits
from runtime.server.worker import Worker
from tests.helpers.fake_heads import FakeHeads

MODEL_ID = "tiny"
PROMPT = [20, 63, 6]
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
MESSAGES: Any = [{"role": "system", "content": "w5 w9"}, {"role": "user", "content": "w17 w60 w3"}]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
LIMITS = Limits(max_tokens=200, max_body_bytes=20_000, max_waiting=2, max_running=1)


@contextmanager
def running(
    load: Callable[[], tuple[Any, Any]],
    *,
    wait: bool = True,
    aliases: Sequence[str] = (),
    kv_bytes: int | None = None,
    **options: Any,
) -> Iterator[tuple[str, Worker]]:
    """Its address and its worker, once the model is loaded; both are stopped afterwards.

    Args:
        kv_bytes: as `Worker` takes it.
        options: of `make_app`.
    """
    limits = options.setdefault("limits", Limits())
    worker = Worker(load, max_waiting=limits.max_waiting, max_running=limits.max_running, kv_bytes=kv_bytes)
    app = make_app(worker, names=[MODEL_ID, *aliases], **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        worker.start()
        thread.start()
        until(lambda: server.started and (not wait or worker.state == "ready"))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", worker
        finally:
            server.should_exit = True
            thread.join(60)
            assert worker.stop(60) and not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until it holds; on a machine that does nothing else this is over at once."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


class Valve(FakeHeads):
    """Random drafts, made only while it is open; fails on request."""

    def __init__(self) -> None:
        super().__init__("random", [2, 4], vocabulary=128)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.failing = False

    def propose(self, *args: Any) -> Any:
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
        return not self.worker.num_running and not self.worker.num_waiting

    def metrics(self) -> dict[str, float]:
        """All that /metrics tells, by name and labels."""
        page = urllib.request.urlopen(f"{self.url}/metrics").read().decode()
        pairs = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def hold(self) -> None:
        """Keep the next request at its first draft."""
        self.valve.reached.clear()
        self.valve.open.clear()

    def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        """Status and JSON."""
        status, _, text = self.ask(body, path, **headers)
        return status, json.loads(text)

    def ask(self, body: bytes, path: str, **headers: str) -> tuple[int, str | None, str]:
        """Status, type and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            return response.status, response.getheader("Content-Type"), response.read().decode()
        finally:
            connection.close()

    def send(self, **body: Any) -> socket.socket:
        """A request whose answer is not read."""
        raw = json.dumps({"model": MODEL_ID, "prompt": PROMPT} | body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return connection


def stock(served: Any, ids: list[int], *, seed: int | None = None, **options: Any) -> list[int]:
    """New ids of plain `generate`."""
    _, model, _ = served
    if seed is not None:
        torch.manual_seed(seed)
    with model.specbound.disabled():
        found: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return found


def chat_ids(tokenizer: Any) -> list[int]:
    """Ids of `MESSAGES` in the chat template."""
    ids: list[int] = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def following(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text of ids that go on with a prompt: what the whole has more."""
    whole: str = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    return whole.removeprefix(tokenizer.decode(prompt, skip_special_tokens=True))


def stock_text(model: Any, tokenizer: Any) -> str:
    """What stock answers to the prompt with 8 tokens."""
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :]
    return following(tokenizer, PROMPT, ids.tolist())


@contextmanager
def held(model: Any, tokenizer: Any, limits: Limits = LIMITS, kv_bytes: int | None = None) -> Iterator[Served]:
    """A server of the model, and random drafts that can be held."""
    valve = Valve()
    attach(model, SpecBound(model, valve, SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, tokenizer), limits=limits, kv_bytes=kv_bytes) as (url, worker):
        yield Served(url, worker, model, valve)
        valve.open.set()
    detach(model)
