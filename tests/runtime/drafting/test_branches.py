"""What follows a token: sources put together, and the target's way down the tree."""

import pytest

from runtime.decoding.accept import Accepted, accept
from runtime.drafting.branches import Branch, merge


def test_accept_walks_the_target_s_own_choices() -> None:
    """Down the branch that it chooses, as far as that was drafted."""
    tokens, parents = [5, 6, 7, 8, 9], [0, 0, 2, 2, 4]
    chosen = {0: 6, 2: 8, 4: 9, 5: 1}
    assert accept(tokens, parents, lambda row: (chosen[row], False)) == Accepted([6, 8, 9, 1], [0, 2, 4, 5], False)
    assert accept(tokens, parents, lambda row: (chosen[row], row == 2)) == Accepted([6, 8], [0, 2, 4], True)
    assert accept([], [], lambda row: (3, False)) == Accepted([3], [0], False)


def test_sources_are_put_together() -> None:
    """The lookup's token keeps its confidence, others share what is left; a deeper head's proposals take over."""
    looked_up = merge([], [("a", 0.6)], 0)
    assert looked_up == [Branch("a", 0, 0.6)]
    both = merge(looked_up, [("b", 0.5), ("a", 0.2), ("c", 0.1)], 2)
    assert [branch.token for branch in both] == ["a", "b", "c"] and both[0] == looked_up[0]
    assert both[1].confidence == pytest.approx(0.5 * 0.4 / 0.8) and both[1].layer == 2
    assert merge(looked_up, [("a", 0.9), ("b", 0.05)], 2)[0] == Branch("a", 2, 0.9)
    assert [branch.layer for branch in merge(merge([], [("b", 0.5)], 2), [("d", 0.4)], 4)] == [4]
