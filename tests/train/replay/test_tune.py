"""Tuning: at least as fast as hand-set bounds, the user's settings kept, nothing drafted where nothing pays."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from runtime.drafting.heads import AGES
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import DataError
from train.calibration.exit_log import ExitLog
from train.calibration.lookup_traces import DISTANCES, LookupTraces
from train.calibration.traces import Traces
from train.replay import search as tuning
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import OFF, WIDTHS, Held, cross_fitted, tune
from train.replay.variants import FULL, UNCALIBRATED, ablate

COSTS = CostTable.counted(12, head=0.3, unembedding=2.0)


def made(layers: tuple[int, ...], confidence: Any, correct: Any, **where: Any) -> Traces:
    """Traces of one draft a source and position, each source's a token of its own; arrays of shape [sources, N]."""
    rank = np.where(correct, 0, -1).astype(np.int8)[:, None]
    return Traces(layers, confidence[:, None, None], rank, np.full_like(rank, -1), **where)


def honest_traces(texts: int = 12, seed: int = 0) -> Traces:
    """A precise but rare lookup, a poor exit at 2 and a good one at 6; confidences are the chances of being right."""
    numbers = np.random.default_rng(seed)
    length = 50 * texts
    confidence = np.stack(
        [
            np.where(numbers.random(length) < 0.2, 0.9, 0.05),
            numbers.random(length) * 0.5,
            numbers.beta(2, 1, length),
        ]
    ).astype(np.float32)
    return made(
        (0, 2, 6),
        confidence,
        numbers.random(confidence.shape) < confidence,
        sequence=np.repeat(np.arange(texts), 50),
        context=np.tile(np.arange(50), texts),
    )


@pytest.fixture(scope="module")
def tuned() -> tuple[SpeculationBounds, Any]:
    """Bounds for the honest traces, and what they give."""
    return tune(honest_traces(), COSTS, progress=False)


def constant(*, confidence: float, correct: bool) -> Traces:
    """Every source alike at every position."""
    shape = (3, 90)
    given = np.full(shape, confidence, np.float32), np.full(shape, correct)
    return made((0, 2, 6), *given, sequence=np.zeros(90, int), context=np.arange(90))


def test_tuned_bounds_are_the_fastest(tuned: Any) -> None:
    """Faster than the paper's policy at any of its settings; the poor exit is not asked."""
    traces, (bounds, found) = honest_traces(), tuned
    replayer = Replayer(traces, COSTS)
    by_hand = [
        SpeculationBounds(tau, deepest, width)
        for tau in (0.3, 0.5, 0.7, 0.9)
        for deepest in (0, 2, 6)
        for width in (2, 4, 8)
    ]
    assert found.speedup >= max(replayer.run(bounds).speedup for bounds in by_hand)
    assert found.speedup > 1.0 and 2 not in bounds.exits(traces.layers)
    assert tune(traces, COSTS, progress=False)[0] == bounds
    assert 1.0 < cross_fitted(traces, COSTS) < found.speedup * 1.1


def test_good_shallow_drafts_pay() -> None:
    """Always right at depth 0: the widest round, nothing deeper."""
    bounds, found = tune(constant(confidence=0.99, correct=True), COSTS, progress=False)
    assert (bounds.max_draft_tokens, bounds.max_exit_layer) == (max(WIDTHS), 0) and found.speedup > 2


def test_what_a_draft_is_charged_is_of_our_own_loop(tuned: Any) -> None:
    """However slow stock's `generate` is."""
    slow, usual = (Replayer(honest_traces(), replace(COSTS, plain=factor * COSTS.plain)) for factor in (9, 1))
    assert tuning._speed(slow, tuned[0]) == tuning._speed(usual, tuned[0])


def test_drafts_that_barely_pay_are_left_out(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a draft is charged beyond its cost decides; what is predicted stays without it."""
    traces, (_, found) = honest_traces(), tuned
    monkeypatch.setattr(tuning, "CAUTION", 0.4)
    fewer, slower = tune(traces, COSTS, progress=False)
    assert slower.drafted.total() < found.drafted.total() and slower.speedup <= found.speedup
    assert slower.speedup == Replayer(traces, COSTS).run(fewer).speedup
    monkeypatch.setattr(tuning, "CAUTION", 10.0)
    assert tune(traces, COSTS, progress=False)[1].drafted.total() == 0


def test_nothing_is_drafted_where_nothing_pays() -> None:
    """Sure and always wrong."""
    bounds, found = tune(constant(confidence=0.99, correct=False), COSTS, progress=False)
    assert (bounds.exit_threshold, bounds.max_draft_tokens) == (OFF, 0)
    assert found.drafted.total() == 0 and found.speedup == pytest.approx(1.0)


def test_given_bounds_are_held() -> None:
    """Whatever they cost."""
    traces = constant(confidence=0.99, correct=False)
    bounds, found = tune(traces, COSTS, Held(exit_threshold=0.5, max_draft_tokens=3), progress=False)
    assert (bounds.exit_threshold, bounds.max_draft_tokens) == (0.5, 3) and found.speedup < 1
    refused, _ = tune(traces, COSTS, Held(max_draft_tokens=3), progress=False)
    assert (refused.exit_threshold, refused.max_draft_tokens) == (OFF, 3)
    shallow, _ = tune(honest_traces(), COSTS, Held(max_exit_layer=2), progress=False)
    assert shallow.max_exit_layer == 2


def test_traces_on_disk(tmp_path: Path) -> None:
    """Read back as written; what is no file of traces is refused."""
    traces = honest_traces(3)
    traces.write(tmp_path / "t.safetensors", weights_sha256="one")
    read = Traces.read(tmp_path / "t.safetensors", weights_sha256="one")
    assert read.layers == traces.layers
    for name in ("confidence", "rank", "shared", "sequence", "context"):
        assert np.allclose(getattr(read, name), getattr(traces, name), atol=1e-3)
    assert read.after_wrong is None
    behind = np.where(np.arange(len(traces)) % 3 == 1, np.array([[0.5], [0.25]]), 0).astype(np.float32)
    replace(traces, after_wrong=behind).write(tmp_path / "followed", weights_sha256="one")
    followed = Traces.read(tmp_path / "followed", weights_sha256="one").after_wrong
    assert followed is not None and followed.tolist() == behind.tolist()
    some = replace(traces, after_wrong=behind).of_sequences(np.array([False, True, True])).after_wrong
    assert some is not None and some.tolist() == behind[:, traces.sequence > 0].tolist()
    (tmp_path / "bad").write_bytes(b"123")
    for name, heads, message in (
        ("t.safetensors", "other", "heads of another fit"),
        ("none", "one", "is not there"),
        ("bad", "one", "not a file of traces"),
    ):
        with pytest.raises(DataError, match=message):
            Traces.read(tmp_path / name, weights_sha256=heads)
    with pytest.raises(DataError, match="no confidences at T = 1"):
        read.without_temperatures()
    part = traces.of_sequences(np.array([False, True, True]))
    assert part.num_sequences == 2 and len(part) == 100 and part.sequence[0] == 0
    with pytest.raises(DataError, match="do not fit"):
        replace(traces, sequence=traces.sequence + 1)


def test_traces_of_an_older_specbound_are_refused_by_name(tmp_path: Path) -> None:
    """Those logged one draft a source, for chains."""
    path = tmp_path / "old.safetensors"
    honest_traces(3).write(path, weights_sha256="one")
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name not in ("rank", "shared")}  # noqa: SIM118
    save_file(tensors | {"right": np.zeros((3, 1, 150), bool)}, path, metadata={"weights_sha256": "one"})
    with pytest.raises(
        DataError, match=r"of an older specbound, without what a draft tree needs.*fit the adapter again"
    ):
        Traces.read(path, weights_sha256="one")


def test_logs_are_put_together() -> None:
    """Sources in order of depth; which draft is the base's choice, which the lookup's; context counts the prompt."""
    log = ExitLog({4: 1.0}, ages=AGES)
    target = torch.tensor([0, 2, 1, 3, 9])  # the draft vocabulary is 0 to 3
    features = SimpleNamespace(target=target, lengths=[3, 2])
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 5)
    log.add(features, [{4: logits}, *[{4: logits.flip(1)}] * (DISTANCES - 1)], torch.arange(4))
    rows = [([7] * 9 + [5], [0, 2, 1]), ([7, 7, 5], [3, 9])]
    looked_up = LookupTraces.collect(rows, target.tolist())
    traces = Traces.of(rows, log, (looked_up, looked_up.fit()))
    assert traces.layers == (0, 4) and traces.confidence.shape == (2, DISTANCES, 4, 5)
    assert traces.context.tolist() == [10, 11, 12, 3, 4] and traces.remaining.tolist() == [3, 2, 1, 2, 1]
    assert traces.rank[1, :2].tolist() == [[0, 2, 1, 3, -1], [3, 1, 2, 0, -1]]
    assert (traces.rank[0] == np.where(looked_up.correct, 0, -1)).all() and not traces.confidence[0, :, 1:].any()
    assert traces.correct[1, :2].tolist() == [[True, *[False] * 4], [False, False, False, True, False]]
    assert Traces.of(rows, log, None).layers == (4,) and (Traces.of(rows, log, None).shared == -1).all()


def test_heads_are_not_switched_off_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that costs 0.1 % more than it gains stays; one that costs more than noise goes."""
    traces, even, dear = honest_traces(), replace(COSTS, head=2.6, head_row=0.0), replace(COSTS, head=4.0)
    assert tune(traces, even, progress=False)[0].exits(traces.layers) == [0, 6]
    assert tune(traces, dear, progress=False)[0].exits(traces.layers) == [0]
    monkeypatch.setattr(tuning, "NOISE", 0.0)
    assert tune(traces, even, progress=False)[0].exits(traces.layers) == [0]


def test_a_good_head_behind_a_poor_one_is_found() -> None:
    """Nearly as dear as what it gains, so that with a poor exit asked before it, it would not pay."""
    traces, costs = honest_traces(), replace(COSTS, head=2.0, head_row=0.0)
    bounds, found = tune(traces, costs, progress=False)
    assert bounds.exits(traces.layers) == [0, 6]
    assert found.speedup > tune(traces, costs, Held(max_exit_layer=0), progress=False)[1].speedup * 1.02


def test_cost_tables_on_disk(tmp_path: Path) -> None:
    """Read back as written; between and beyond measured widths by the nearest line; damage is refused."""
    path = tmp_path / "costs.json"
    COSTS.write(path)
    assert CostTable.read(path) == COSTS
    assert COSTS.block({1: 1.0, 2: 1.5, 4: 2.0}, 3) == pytest.approx(1.75)
    assert COSTS.block({1: 1.0, 2: 1.5, 4: 2.0}, 8) == pytest.approx(3.0)
    for text in ("", "{}", '{"format": 9}'):
        path.write_text(text)
        with pytest.raises(DataError, match="specbound profile"):
            CostTable.read(path)


def test_ablations_by_replay(tuned: Any) -> None:
    """Each part of the bounds taken away once; less of what pays is slower."""
    traces, (bounds, found) = honest_traces(), tuned
    logged = replace(traces, uncalibrated=np.sqrt(traces.confidence))
    ablated = ablate(logged, bounds, COSTS)
    fastest = max(one["predicted_speedup"] for one in ablated.values())
    assert ablated[FULL]["predicted_speedup"] == found.speedup >= fastest - 0.01
    assert ablated["lookup alone"]["predicted_speedup"] < found.speedup > ablated["heads alone"]["predicted_speedup"]
    assert ablated[UNCALIBRATED]["acceptance_rate"] < ablated[FULL]["acceptance_rate"]
    idle = SpeculationBounds(OFF, 6, 4)
    assert ablate(logged, idle, COSTS)[FULL]["layer_passes_per_token"] == 12
    assert ablated[FULL]["layer_passes_per_token"] < 12
