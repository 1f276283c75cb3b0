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
            otherwise) or bonus token (all drafts of the path were right), unless generation stopped before it.
        path: verified rows of the emitted tokens' prefixes: 0, then n + 1 for each accepted draft with index n.
        stopped: whether generation ends here.
    """

    tokens: list[int]
    path: list[int]
    stopped: bool

    @property
    def drafts(self) -> list[int]:
        """Indices of the accepted drafts."""
        return [row - 1 for row in self.path[1:]]


def accept(draft_tokens: Sequence[int], parents: Sequence[int], choose: Callable[[int], tuple[int, bool]]) -> Accepted:
    """Emit the target's choices while a draft agrees with them, and one more.

    Args:
        draft_tokens: drafted token ids; no parent has two drafts of one token.
        parents: verified row that each of them follows: 0, or n + 1 for the draft with index n.
        choose: `choose(row)` returns the target's token after the prefix that ends at verified row `row`, and
            whether generation stops with it. Called for the rows of one path in order, with none repeated.
    """
    rows = {both: index + 1 for index, both in enumerate(zip(parents, draft_tokens, strict=True))}
    tokens: list[int] = []
    path = [0]
    while True:
        token, stop = choose(path[-1])
        tokens.append(token)
        row = rows.get((path[-1], token))
        if row is not None:
            path.append(row)
        if stop or row is None:
            return Accepted(tokens, path, stop)
