"""`Engine`: requests that decode together, round by round; they join and leave between rounds.

A round drafts for all of them and verifies all of them in one pass: the weights are read once for all their rows. Each
request has its own cache, drafts and choices, so its tokens are those that it has alone. Knows no model and no text.
"""

from runtime.decoding.drafter import Drafter
from runtime.decoding.request import Request
from runtime.decoding.rounds import speculate_round
from runtime.drafting.controller import Controller


class Engine:
    """Decodes requests on one base together.

    Args:
        controller: decides for each round whether it drafts, and how far; None drafts in all of them.

    Attributes:
        running: requests that have begun and not ended.
        rows: of the last round: the newest token of each request, and its drafts.
    """

    def __init__(self, drafter: Drafter, controller: Controller | None = None) -> None:
        self.drafter, self.controller = drafter, controller
        self.running: list[Request] = []
        self.rows = 0

    def join(self, request: Request) -> None:
        """Take a request that has begun; where its first token ended it, it leaves in the next round."""
        self.running.append(request)

    def leave(self, request: Request) -> None:
        """Take a request out before its end, where it is among those that run."""
        self.running = [each for each in self.running if each is not request]

    def round(self) -> list[Request]:
        """One round of all requests; those that ended, or whose emitter failed, leave and are returned."""
        going = [request for request in self.running if not request.stopped]
        self.rows = speculate_round(going, self.drafter, self.controller) if going else 0
        for request in going:
            if request.error is not None and not isinstance(request.error, Exception):
                raise request.error  # the user wants all of it to stop
        ended = [request for request in self.running if request.stopped or request.error is not None]
        self.running = [request for request in self.running if request not in ended]
        return ended
