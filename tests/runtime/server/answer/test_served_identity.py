"""The script that compares a server's answers with stock's, small; and that it sees one Linear run otherwise."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.scripts import script

TEXTS = [f"{word} {number}" for number, word in enumerate(["sea", "a moon", "why?", "[sum]"] * 5)]


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module, which imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "load"))
    yield script("load/identity")


@pytest.fixture
def stock(served: Any, make_model: Any) -> Any:
    """A copy of the served model without SpecBound."""
    vocabulary = len(served[2])
    return make_model(vocab_size=vocabulary, max_position_embeddings=2048, eos_token_id=1)


def test_answers_are_those_of_stock_alone(served: Any, stock: Any, identity: Any) -> None:
    """Every kind, alone and six at once; the server drafted, and stop strings and clients that left were there."""
    questions, without = identity.asked(identity.Oracle(stock, served[2]), TEXTS, 16, 0)
    assert set(without) <= {identity.BOUND_KIND}
    report = identity.compared(served[0], questions, [1, 6], 0)
    assert report["differing"] == 0, report["differences"]
    for run in report["at_once"].values():
        assert sum(run["same_of_all"][trait][1] for trait in ("greedy", "seeded")) == len(TEXTS)
        assert all(same == every for same, every in run["same_of_all"].values())
    (stopped, *_) = [one for one in questions if one.kind == identity.STOPPED]
    assert stopped.expected[0].reason == "stop" and len(stopped.expected[0].ids) < 16
    assert sum(count for name, count in report["server"].items() if name.startswith("drafted")) > 50
    identity.show(report)


def test_one_linear_run_otherwise_is_found(served: Any, stock: Any, identity: Any) -> None:
    """Negative control: halves of a sum apart differ by a bit, which probabilities tell."""
    assert identity.spoil(stock) in dict(stock.named_modules())
    questions, _ = identity.asked(identity.Oracle(stock, served[2]), TEXTS[:4], 8, 0)
    report = identity.compared(served[0], questions, [2], 0)
    assert report["differing"] and any("logprobs" in what for one in report["differences"] for what in one["what"])
