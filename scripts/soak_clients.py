"""`Soak`: the clients of `soak.py`, good and bad, and what they find wrong."""

import http.client
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Body = dict[str, Any]
ROUTE = "/v1/completions"
NUM_QUESTIONS = 24
TIMEOUT = 600.0  # of one request, in seconds: what takes longer is lost
BAD: list[tuple[Any, int]] = [
    (b"{", 400),
    (b"", 400),
    (b"[" * 5000, 400),
    (b"x" * (1 << 21), 413),
    ({"model": "another"}, 404),
    ({"max_tokens": -2}, 400),
    ({"prompt": []}, 400),
    ({"prompt": [10**9]}, 400),
    ({"max_tokens": 10**9}, 400),
    ({"colour": "red"}, 400),
]


# What a quarter of the questions asks for besides.
EXTRAS: list[dict[str, Any]] = [
    {},
    {"stop": ["e", "6"]},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"logprobs": 2},
]
KINDS = {"whole": 35, "stream": 30, "slow": 10, "leaves": 15, "bad": 10}  # of a hundred requests


@dataclass
class Question:
    """A body, and what plain decoding alone answers to it; probabilities, where it asks for any, are in the text."""

    body: Body
    ids: list[int] = field(default_factory=list)
    text: str = ""


class Soak:
    """One server and its clients.

    Attributes:
        counts: requests by kind and by what came of them.
        faults: what should not have been, in words; the first few.
        seen: ids of answers.
    """

    def __init__(self, port: int, model: str, pid: int, seed: int) -> None:
        self.port, self.model, self.pid = port, model, pid
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.seen: set[str] = set()
        self.lock = threading.Lock()

    def questions(self) -> list[Question]:
        """Some greedy and some sampled, with the ids of plain decoding alone."""
        made = []
        for number in range(NUM_QUESTIONS):
            prompt = [self.random.randrange(5, 100) for _ in range(self.random.randrange(2, 40))]
            how: Body = {"temperature": 0} if number % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": number}
            limit = self.random.randrange(1, 16)
            how |= EXTRAS[(number // 2 + number) % len(EXTRAS)]
            made.append(Question({"model": self.model, "prompt": prompt, "max_tokens": limit} | how))
        for each in made:
            each.ids, each.text = self.read_stream(each.body | {"specbound": {"enabled": False}})
        return made

    def one(self, question: Question, kind: str, delay: float) -> None:
        """One request of a kind."""
        try:
            if kind == "bad":
                self.ask_badly(question, *BAD[int(delay * len(BAD))])
            elif kind == "leaves":
                self.leave(question, delay)
            elif kind == "whole":
                text = self.read_whole(question.body)
                self.check(text == question.text, f"another text: {text!r}, alone {question.text!r}")
            else:
                pause = (lambda: time.sleep(delay / 100)) if kind == "slow" else (lambda: None)
                ids, text = self.read_stream(question.body, pause)
                self.check((ids, text) == (question.ids, question.text), f"other ids: {ids}, alone {question.ids}")
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            self.check(False, f"lost ({kind}): {type(error).__name__}: {error}")
        with self.lock:
            self.counts[kind] += 1

    def check(self, holds: bool, otherwise: str) -> None:
        """Keep what is wrong."""
        with self.lock:
            self.counts["right" if holds else "wrong"] += 1
            if not holds and len(self.faults) < 10:
                self.faults.append(otherwise)

    def post(self, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A request on a connection of its own, and the beginning of its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", ROUTE, raw, {"Content-Type": "application/json", "Connection": "close"})
        response = connection.getresponse()
        with self.lock:
            self.counts[f"status {response.status}"] += 1
        return connection, response

    def read_whole(self, body: Body) -> str:
        """Text of an answer; nothing follows it on its connection."""
        connection, response = self.post(body)
        answer, rest = json.loads(response.read()), response.fp and response.fp.read(1)
        connection.close()
        self.once(answer["id"], not rest)
        choice = answer["choices"][0]
        return str(choice["text"]) + _in_words(choice["logprobs"] and choice["logprobs"]["token_logprobs"])

    def read_stream(self, body: Body, pause: Callable[[], object] = lambda: None) -> tuple[list[int], str]:
        """Ids and text of a stream, which has one end."""
        about = {"stream": True, "specbound": {"rounds": True} | body.get("specbound", {})}
        connection, response = self.post(body | about)
        ids, text, ends, name = [], "", 0, ""
        likely: list[float] = []
        while line := response.readline():
            pause()
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                name, choice, own = event["id"], event["choices"][0], event.get("specbound", {})
                text, ends = text + choice["text"], ends + (choice["finish_reason"] is not None)
                ids += [own["token"]] if own.get("token") is not None else []
                likely += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
            elif line.startswith(b"data: [DONE]"):
                ends += 1
        connection.close()
        self.once(name, ends == 2)
        return ids, text + _in_words(likely)

    def once(self, name: str, ended: bool) -> None:
        """An answer is there once, whole."""
        with self.lock:
            fresh = name not in self.seen
            self.seen.add(name)
        if not (fresh and ended):
            self.check(False, f"answer {name}: {'cut short, or followed by more' if fresh else 'there twice'}")

    def ask_badly(self, question: Question, wrong: Any, status: int) -> None:
        """What must be refused."""
        connection, response = self.post(wrong if isinstance(wrong, bytes) else question.body | wrong)
        said = json.loads(response.read())
        connection.close()
        self.check(response.status == status and bool(said["error"]["message"]), f"{response.status} to {wrong!r:.60}")

    def leave(self, question: Question, delay: float) -> None:
        """Close before the answer is read, early or late."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        body = question.body | {"stream": delay < 0.5, "max_tokens": 100}
        connection.request("POST", ROUTE, json.dumps(body), {"Content-Type": "application/json"})
        if delay < 0.25:
            connection.getresponse().readline()
        time.sleep(delay / 5)
        connection.close()

    def run(self, questions: list[Question], requests: int, concurrency: int) -> list[int | None]:
        """All requests; the server's memory in bytes after a quarter of them, and at the end."""
        kinds = self.random.choices([*KINDS], [*KINDS.values()], k=requests)
        plan = [(self.random.choice(questions), kind, self.random.random()) for kind in kinds]
        memory = []
        with ThreadPoolExecutor(concurrency) as pool:
            for part in (plan[: requests // 4], plan[requests // 4 :]):
                list(pool.map(lambda each: self.one(*each), part))
                memory.append(resident(self.pid))
        return memory

    def compare_counts(self, before: dict[str, float]) -> dict[str, float]:
        """Requests by outcome as the server counted them, once nothing runs; they add up to those that were sent."""
        busy = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + 60
        while any((now := self.metrics())[f"specbound_{name}"] for name in busy) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.check(not any(now[f"specbound_{name}"] for name in busy), f"something is held: {now}")
        found = {}
        for name, value in now.items():
            if match := re.match(r'specbound_requests_total\{outcome="(\w+)"\}', name):
                found[match[1]] = value - before.get(name, 0)
        sent = sum(self.counts[kind] for kind in KINDS)
        self.check(sum(found.values()) == sent, f"{sent} requests, and the server counts {found}")
        self.check(found.get("refused", 0) == self.counts["bad"], f"{self.counts['bad']} bad ones: {found}")
        self.check(not found.get("failed"), f"some failed: {found}")
        return found

    def metrics(self) -> dict[str, float]:
        """All that /metrics tells."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        connection.close()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        }


def _in_words(logprobs: list[float] | None) -> str:
    """Probabilities behind a text."""
    return f" {logprobs}" if logprobs else ""


def resident(pid: int) -> int | None:
    """Memory that a process has in RAM, in bytes; None where the system does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024
