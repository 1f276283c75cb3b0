"""The soak of `scripts/soak.py`, small, against a server in this process; and that it sees what is wrong."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.server.request.limits import Limits
from tests.helpers.scripts import script
from tests.helpers.servers import MODEL_ID, Served, held


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[Served]:
    with held(make_model(num_hidden_layers=5), make_tokenizer(), Limits()) as found:
        yield found


@pytest.fixture
def soak(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A soak of it, with few questions."""
    clients = script("soak_clients")
    monkeypatch.setattr(clients, "NUM_QUESTIONS", 4)
    return clients.Soak(served.port, MODEL_ID, os.getpid(), seed=1)


def test_a_small_soak(soak: Any) -> None:
    """Clients of all kinds at once: nothing lost, nothing twice, ids as alone, and the counts add up."""
    questions = soak.questions()
    before = soak.metrics()
    soak.counts.clear()
    memory = soak.run(questions, 60, 8)
    outcomes = soak.compare_counts(before)
    assert not soak.faults and not soak.counts["wrong"]
    assert all(soak.counts[kind] for kind in ("whole", "stream", "slow", "leaves", "bad"))
    assert sum(outcomes.values()) == 60 and outcomes["length"] + outcomes["stop"] >= soak.counts["whole"]
    assert len(memory) == 2
    assert any("stop" in question.body for question in questions)
    assert all(question.text.endswith("]") for question in questions if "logprobs" in question.body)


def test_what_is_wrong_is_seen(soak: Any) -> None:
    """Negative control: another text, another id, a lost answer, one there twice, counts that do not add up."""
    question = soak.questions()[0]
    before = soak.metrics()
    soak.counts.clear()
    question.text, question.ids = question.text + " w1", [*question.ids, 1]
    for kind in ("whole", "stream"):
        soak.one(question, kind, 0.0)
    soak.once("cmpl-1", True)
    soak.once("cmpl-1", True)
    soak.once("cmpl-2", False)
    soak.counts["whole"] += 1
    soak.compare_counts(before)
    soak.port = 1  # where nobody listens
    soak.one(question, "whole", 0.0)
    said = [
        "another text",
        "other ids",
        "cmpl-1: there twice",
        "cmpl-2: cut short",
        "3 requests, and the server",
        "lost",
    ]
    assert len(soak.faults) == len(said)
    assert all(word in fault for word, fault in zip(said, soak.faults, strict=True))
