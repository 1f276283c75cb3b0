"""Requests that decode together, on a clock of their own: they draft where it pays, and in as many rows as pay."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from runtime.batch import Batch, Call, generated
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds, widths
from runtime.drafting.trial import ALLOWED_LOSS, Race
from tests.helpers.speculation import GREEDY, PROMPTS, adapted, alone, base

BOUNDS = SpeculationBounds(0.4, 8, 15)
# Price of a round by its rows; between these it lies on a line.
STEEP = {1: 1.0, 4: 1.08, 8: 1.24, 9: 1.7, 16: 2.1}  # a CPU without AMX
FLAT = {1: 1.0, 16: 1.15}
# What asking the heads adds to a round, in rounds of one row.
HEADS = 0.1


class World:
    """Requests whose first draft is right that often, and each further one half of the time."""

    def __init__(self, prices: dict[int, float], chance: float, seed: int = 0) -> None:
        self.now, self.prices, self.chance, self.numbers = 0.0, prices, chance, random.Random(seed)
        self.controller = Controller(lambda: self.now)
        self.rounds: list[tuple[int, int, float, float]] = []  # requests, rows, gain over a plain round, its price

    def price(self, rows: int) -> float:
        """Of a round with so many rows."""
        low = max(known for known in self.prices if known <= rows)
        high = min(known for known in self.prices if known >= rows)
        part = (rows - low) / max(1, high - low)
        return self.prices[low] + part * (self.prices[high] - self.prices[low])

    def round(self, requests: int) -> None:
        """One round of so many."""
        allowed = self.controller.begin([BOUNDS] * requests)
        drafts = sum(bounds.max_draft_tokens for bounds in allowed)
        judged, tokens = [], 0
        for bounds in allowed:
            accepted = 0
            while accepted < bounds.max_draft_tokens and self.numbers.random() < (0.5 if accepted else self.chance):
                accepted += 1
            judged += [(2, 0.5, index < accepted) for index in range(bounds.max_draft_tokens)][: accepted + 1]
            tokens += accepted + 1
        price = self.price(requests + drafts) + (HEADS if drafts else 0.0)
        self.now += price
        self.controller.end(judged, tokens)
        self.rounds.append((requests, requests + drafts, tokens / requests, price))

    def run(self, occupancy: Callable[[int], int], rounds: int) -> float:
        """So many rounds; their tokens a second, over those of plain rounds of as many requests."""
        for number in range(rounds):
            self.round(occupancy(number))
        return self.speed(self.rounds[-rounds:])

    def speed(self, rounds: Sequence[tuple[int, int, float, float]]) -> float:
        """Tokens a second over those of plain rounds."""
        plain = sum(self.price(requests) * tokens for requests, _, tokens, _ in rounds)
        return plain / sum(price for *_, price in rounds)

    def rows(self, rounds: int) -> list[int]:
        """Of the last rounds."""
        return [rows for _, rows, _, _ in self.rounds[-rounds:]]


def changing(number: int) -> int:
    """From two to five requests, another number every third round."""
    return 2 + number // 3 % 4


def test_half_of_the_rows_where_all_of_them_are_too_dear() -> None:
    """Sixteen rows cost 2.1, eight 1.24: four requests draft one token each, which pays."""
    world = World(STEEP, 0.47)
    assert world.run(lambda _: 4, 500) > 1.12
    assert world.rows(500).count(8) > 440


@pytest.mark.parametrize("requests", [2, 3, 4, 5])
def test_all_rows_where_they_cost_little(requests: int) -> None:
    """Sixteen rows cost 1.15: drafting goes on, and from three requests on in all of them, which pays more."""
    world = World(FLAT, 0.47)
    assert world.run(lambda _: requests, 500) > 1.38
    drafting = [rows for rows in world.rows(500) if rows > requests]
    assert len(drafting) > 480
    assert requests == 2 or drafting.count(16 // requests * requests) > 400


@pytest.mark.parametrize("requests", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("prices", [STEEP, FLAT], ids=["steep", "flat"])
@pytest.mark.parametrize("chance", [0.0, 0.2])
def test_what_does_not_pay_costs_little(requests: int, prices: dict[int, float], chance: float) -> None:
    """At least 0.97 of plain rounds of as many requests over the first 500 rounds, more after."""
    world = World(prices, chance)
    assert world.run(lambda _: requests, 500) >= 0.97
    assert world.run(lambda _: requests, 4000) >= 0.985


@pytest.mark.parametrize(
    "occupancy", [changing, lambda number: 5 - number // 10 % 4, lambda number: 2 + 97 * number * number % 5]
)
def test_a_number_that_changes_all_the_time_costs_little(occupancy: Callable[[int], int]) -> None:
    """Nothing is ever accepted: at least 0.96 of plain rounds over the first 500 of all numbers, not of each."""
    world = World(STEEP, 0.0)
    assert world.run(occupancy, 500) >= 0.96
    assert world.run(occupancy, 4000) >= 0.985


def test_each_number_keeps_its_verdict() -> None:
    """Another number every third round: two and four draft all the same, five do not, and each in its own rows."""
    world = World(STEEP, 0.47)
    world.run(changing, 2000)
    assert world.run(changing, 1000) > 1.15
    drafting = {
        number: sum(rows > number for n, rows, *_ in world.rounds[-1000:] if n == number) for number in (2, 4, 5)
    }
    assert drafting[2] > 220 and drafting[4] > 220 and drafting[5] < 50


def test_a_machine_that_changes_is_noticed() -> None:
    """Steep at first, flat then: four requests come to all rows."""
    world = World(STEEP, 0.47)
    world.run(lambda _: 4, 1000)
    world.prices = FLAT
    world.run(lambda _: 4, 1000)
    assert world.rows(500).count(16) > 400


def test_old_prices_are_not_believed() -> None:
    """Plain rounds became cheap while another number decoded: drafts that do not pay any more are seen to lose."""
    world = World({rows: 3 * price for rows, price in FLAT.items()}, 0.1)
    world.run(lambda _: 2, 60)
    world.run(lambda _: 3, 200)
    world.prices = STEEP
    assert world.run(lambda _: 2, 150) >= 0.95


def test_the_same_clock_gives_the_same_rounds() -> None:
    """Nothing else plays a part."""
    worlds = [World(STEEP, 0.4), World(STEEP, 0.4)]
    for world in worlds:
        world.run(changing, 400)
    assert worlds[0].rounds == worlds[1].rounds


def test_requests_that_draft_nothing_stay_so() -> None:
    """Their bounds are what they ask for, beside one that drafts."""
    world = World(FLAT, 0.5)
    world.run(lambda _: 2, 10)
    idle = SpeculationBounds(0.4, 8, 0)
    allowed = world.controller.begin([BOUNDS, idle])
    assert allowed[0].max_draft_tokens > 0 and allowed[1].max_draft_tokens == 0


def test_a_race_is_won_by_tokens_for_their_price() -> None:
    """Not by tokens of a round; one width alone has nothing to race against."""
    race, seen = Race([16, 8]), []
    for _ in range(120):
        seen.append(race.rows)
        race.add(3.0 if race.rows == 16 else 1.8, 2.0 if race.rows == 16 else 1.1)
    assert 16 in seen and set(seen[-80:]) == {8}
    sole = Race([16])
    for _ in range(10):
        sole.add(0.0, 3.0)
        assert sole.rows == 16
    assert [widths(requests) for requests in (2, 4, 5, 6, 40)] == [[16, 8], [16, 8], [16], [], []]


def test_a_batch_rests_and_ids_are_the_same() -> None:
    """Drafts that are right, on a clock that makes them dear: few are made, each text is that of its request alone."""
    model = base(torch.float32)
    options: dict[str, Any] = GREEDY | {"max_new_tokens": 150}
    expected = alone(model, options)
    made, calls = adapted(model, expected), list[Call]()
    made.specbound.controller = Controller(
        lambda: sum(100.0 * call.stats.drafted.total() + call.stats.rounds for call in calls if call.stats is not None)
    )
    with Batch(made, 4) as batch:
        calls += [batch.add(prompt, **options) for prompt in PROMPTS[:4]]
        while not all(call.ended for call in calls):
            batch.round()
    assert [generated(call) for call in calls] == expected[:4]
    stats = [call.stats for call in calls if call.stats is not None]
    assert sum(one.resting_rounds for one in stats) > 0.8 * sum(one.rounds for one in stats)
    assert 0 < sum(one.drafted.total() for one in stats) <= 4 * 3 * 4 * (ALLOWED_LOSS + 1)
