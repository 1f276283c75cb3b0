"""The controller on a clock of its own: what pays goes on, what does not is dropped soon and tried again cheaply."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from runtime.decoding.accept import Accepted
from runtime.decoding.draft import Draft, judged
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.trial import ALLOWED_LOSS, MAX_REST
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

BOUNDS = SpeculationBounds(0.4, 8, 4)


class World:
    """A model whose plain token takes one second, and whose drafting rounds cost and yield what one says."""

    def __init__(self, cost: Callable[[int], float], accepted: Callable[[int], int], layer: int = 4) -> None:
        self.now, self.rounds, self.tokens = 0.0, 0, 0
        self.cost, self.accepted, self.layer = cost, accepted, layer
        self.drafting: list[bool] = []
        self.controller = Controller(lambda: self.now)

    def run(self, tokens: int) -> float:
        """Emit so many tokens; tokens a second, plain decoding being 1."""
        began, target = self.now, self.tokens + tokens
        while self.tokens < target:
            (allowed,) = self.controller.begin([BOUNDS])
            assert allowed.max_draft_tokens <= BOUNDS.max_draft_tokens
            drafts = allowed.max_draft_tokens if allowed.threshold(self.layer) <= 0.9 else 0
            self.drafting.append(allowed.max_draft_tokens > 0)
            accepted = min(drafts, self.accepted(self.rounds)) if drafts else 0
            self.now += self.cost(self.rounds) if self.drafting[-1] else 1.0
            judged = [(self.layer, 0.9, index < accepted) for index in range(drafts)][: accepted + 1]
            self.controller.end(judged, accepted + 1)
            self.tokens += accepted + 1
            self.rounds += 1
        return tokens / (self.now - began)


def test_what_pays_goes_on() -> None:
    """Twice as fast: nearly every round drafts, and nearly all of the gain is had."""
    world = World(cost=lambda _: 1.5, accepted=lambda _: 2)
    assert world.run(3000) > 0.96 * 2
    assert sum(world.drafting) > 0.95 * len(world.drafting)
    assert world.controller.resting == 0


@pytest.mark.parametrize("cost", [1.05, 1.3, 2.0])
def test_what_does_not_pay_costs_little(cost: float) -> None:
    """Nothing is ever accepted: at least 0.97 of plain decoding within 500 tokens, more and more after."""
    world = World(cost=lambda _: cost, accepted=lambda _: 0)
    assert world.run(500) >= 0.97
    assert world.run(5000) >= 0.99


def test_it_comes_back_when_things_change() -> None:
    """A hard text, then an easy one: drafting again within one rest, and for good."""
    world = World(cost=lambda _: 1.4, accepted=lambda round_: 0 if round_ < 800 else 3)
    world.run(700)
    assert not all(world.drafting[-20:])
    world.run(4 * MAX_REST)
    assert world.run(1000) > 0.9 * 4 / 1.4


def test_luck_is_not_taken_for_a_verdict() -> None:
    """Half of the rounds win two tokens at a price of 1.4, half win nothing: it pays, and rests are few."""
    drafting: list[bool] = []
    for seed in range(40):
        numbers = random.Random(seed)
        world = World(cost=lambda _: 1.4, accepted=lambda _, numbers=numbers: 2 * numbers.randrange(2))
        world.run(150)
        drafting += world.drafting
    assert sum(drafting) > 0.93 * len(drafting)


def test_a_pause_of_the_machine_is_not_taken_for_slowness() -> None:
    """One round of a hundred hangs for thirty seconds; drafting goes on."""
    world = World(cost=lambda round_: 30.0 if round_ % 100 == 50 else 1.5, accepted=lambda _: 2)
    world.run(3000)
    assert sum(world.drafting) > 0.9 * len(world.drafting)


def test_a_machine_that_becomes_slower_is_not_taken_for_slow_drafts() -> None:
    """All takes twice as long every other hundred rounds: the price of a plain token is looked up again, no rest."""

    def slow() -> float:
        return 1.0 + (world.rounds // 100 % 2)

    world = World(cost=lambda _: 1.5 * slow(), accepted=lambda _: 1)
    begin, rests = world.controller.begin, []

    def timed(bounds: Sequence[SpeculationBounds]) -> list[SpeculationBounds]:
        rests.append(world.controller.resting)
        allowed = begin(bounds)
        if not allowed[0].max_draft_tokens:
            world.now += slow() - 1.0  # `World` adds the other second
        return allowed

    world.controller.begin = timed  # type: ignore[method-assign]
    world.run(3000)
    assert not any(rests)
    assert sum(world.drafting) > 0.93 * len(world.drafting)


def test_a_source_that_overstates_itself_is_asked_for_more() -> None:
    """Sure at 0.9 and right one time of ten: its threshold rises, within reason; other sources keep theirs. Rounds
    become narrower."""
    controller = Controller(lambda: 0.0)
    for step in range(200):
        controller.begin([BOUNDS])
        controller.end([(4, 0.9, step % 10 == 0)], 1 + (step % 10 == 0))
    allowed = controller._corrected(BOUNDS)
    assert allowed.threshold(4) > 0.8 and allowed.threshold(0) == BOUNDS.exit_threshold
    assert 1 <= allowed.max_draft_tokens < BOUNDS.max_draft_tokens
    honest = Controller(lambda: 0.0)
    for _ in range(200):
        honest.begin([BOUNDS])
        honest.end([(4, 0.9, True)], 2)
    assert honest._corrected(BOUNDS).threshold(4) == BOUNDS.exit_threshold
    assert honest._corrected(BOUNDS).max_draft_tokens == BOUNDS.max_draft_tokens


def test_drafts_after_a_rejected_one_say_nothing() -> None:
    """They continue a text that never was; all that followed an accepted token were judged."""
    draft = Draft([5, 6, 7, 8], [0, 0, 1, 2], [0, 4, 8, 2], [0.9, 0.5, 0.9, 0.7])
    assert judged(draft, Accepted([6, 9], [0, 2], False)) == [(0, 0.9, False), (4, 0.5, True), (2, 0.7, False)]


def test_the_same_clock_gives_the_same_rounds() -> None:
    """Nothing else plays a part."""
    runs = []
    for _ in range(2):
        world = World(cost=lambda round_: 1.1 + 0.3 * (round_ % 7 == 0), accepted=lambda round_: round_ % 3 == 0)
        world.run(400)
        runs.append(world.drafting)
    assert runs[0] == runs[1] and any(runs[0]) and not all(runs[0])


def test_ids_are_the_same_while_it_rests(make_model: Any) -> None:
    """Heads that are always wrong, on a clock that makes them dear: rests, and stock's ids."""
    model, prompt = make_model(), torch.arange(3, 12)[None]
    options = {"max_new_tokens": 150, "do_sample": False}
    stock = model.generate(prompt, **options)
    attach(model, SpecBound(model, FakeHeads("wrong", [2, 4], stock[0].tolist()), SpeculationBounds(0.3, 4, 4)))
    specbound = model.specbound
    specbound.controller = Controller(lambda: float(specbound.stats.rounds + specbound.stats.drafted.total()))
    assert torch.equal(model.generate(prompt, **options), stock)
    stats = specbound.stats
    assert stats.resting_rounds > 100 and stats.drafted.total() <= 4 * (ALLOWED_LOSS + 4)
