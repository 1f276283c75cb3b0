"""Which drafts follow one token: what its sources propose, put together. The runtime and replay run this same code."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Branch(NamedTuple):
    """A draft that may follow a token: token, the source that proposed it, and its confidence."""

    token: Hashable
    layer: int
    confidence: float


def merge(before: Sequence[Branch], proposed: Sequence[tuple[Hashable, float]], layer: int) -> list[Branch]:
    """What follows a token when a further source was asked as well, most confident first.

    The lookup and a head judge from different things, so a token that only one of them names stays; a deeper head has
    seen what the head before it saw, so its proposals take their place. Confidences are shares of one whole: where the
    lookup holds its token to be likelier than the head does, the head's other tokens share what is left.

    Args:
        before: of the sources that were asked before.
        proposed: by this one, tokens and confidences, most confident first, no token twice.
        layer: of this one.
    """
    looked_up = next((branch for branch in before if branch.layer == 0), None)
    if looked_up is None:
        return [Branch(token, layer, confidence) for token, confidence in proposed]
    own = next((confidence for token, confidence in proposed if token == looked_up.token), 0.0)
    kept = looked_up if looked_up.confidence >= own else Branch(looked_up.token, layer, own)
    left = (1.0 - kept.confidence) / max(1e-9, 1.0 - own)
    others = [Branch(token, layer, confidence * left) for token, confidence in proposed if token != kept.token]
    return sorted([kept, *others], key=lambda branch: -branch.confidence)
