"""Acceptance: which drafted tokens the target chooses itself. Pure; knows no model, cache or file.

Greedy or sampled, each emitted token is the target's own choice on the accepted prefix; a draft only decides how
far one verification pass reaches. One choice is made per emitted token, in order, so the stream of random numbers
is that of plain decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accepted:
    """Result of one verification.

    Attributes:
        tokens: emitted tokens, at least one: the accepted drafts, then one recovered token (the target chose
            otherwise) or bonus token (all drafts were right), unless generation stopped before it.
        num_accepted: how many of them were drafts.
        stopped: whether generation ends here.
    """

    tokens: list[int]
    num_accepted: int
    stopped: bool


def accept(draft_tokens: Sequence[int], choose: Callable[[int], tuple[int, bool]]) -> Accepted:
    """Emit the target's choices while they agree with the draft, and one more.

    Args:
        draft_tokens: drafted token ids, in order.
        choose: `choose(row)` returns the target's token after the prefix that ends at verified row `row`, and
            whether generation stops with it. Called for rows 0, 1, ... with no row skipped or repeated.
    """
    tokens: list[int] = []
    num_accepted = 0
    for row in range(len(draft_tokens) + 1):
        token, stop = choose(row)
        tokens.append(token)
        correct = row < len(draft_tokens) and token == draft_tokens[row]
        num_accepted += correct
        if stop or not correct:
            return Accepted(tokens, num_accepted, stop)
    raise AssertionError("unreachable: the row after the last draft is never right")
