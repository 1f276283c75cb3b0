"""`Engine`: requests that decode together, round by round; they join and leave between rounds.

A round drafts for all of them and verifies all of them in one pass: the weights are read once for all their rows. Each
request has its own cache, drafts and choices, so its tokens are those that it has alone. Knows no model and no text.
"""

from dataclasses import replace

from runtime.decoding.drafter import Drafter
from runtime.decoding.request import Request
from runtime.decoding.rounds import speculate_round
from runtime.drafting.policy import SpeculationBounds

# Rows of a round that drafts, of all requests together, and of one request at least. Beyond, asking the heads costs
# more than their drafts give: docs/benchmark.md, several requests.
MAX_ROWS, FEWEST = 16, 3


class Engine:
    """Decodes requests on one base together.

    Attributes:
        running: requests that have begun and not ended.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.running: list[Request] = []

    def join(self, request: Request) -> None:
        """Take a request that has begun; where its first token ended it, it leaves in the next round."""
        self.running.append(request)

    def round(self) -> list[Request]:
        """One round of all requests; those that ended, or whose emitter failed, leave and are returned."""
        going = [request for request in self.running if not request.stopped]
        if going:
            own = [request.bounds for request in going]
            for request in going:
                request.bounds = shared(request.bounds, len(going))
            speculate_round(going, self.drafter)
            for request in going:
                if request.error is not None and not isinstance(request.error, Exception):
                    raise request.error  # the user wants all of it to stop
            for request, bounds in zip(going, own, strict=True):
                request.bounds = bounds
        ended = [request for request in self.running if request.stopped or request.error is not None]
        self.running = [request for request in self.running if not (request.stopped or request.error is not None)]
        return ended


def shared(bounds: SpeculationBounds, requests: int) -> SpeculationBounds:
    """A request's bounds where so many run together: its share of the rows that pay; alone it has what they say."""
    if requests == 1:
        return bounds
    share = MAX_ROWS // requests
    return replace(bounds, max_draft_tokens=min(bounds.max_draft_tokens, share - 1 if share >= FEWEST else 0))
