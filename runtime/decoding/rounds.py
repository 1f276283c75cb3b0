"""The round: draft with the shallow layers, verify in one pass of the deep ones, accept, settle.

Source: SpecBound (arXiv 2604.12247), there for one request. Knows nothing of transformers' `generate`, of files or of
text.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from runtime.decoding.accept import Accepted, accept
from runtime.decoding.draft import Draft, draft_all, draft_tree, judged
from runtime.decoding.drafter import Drafter
from runtime.decoding.request import Request
from runtime.decoding.state import verify_all
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds


def speculate_round(requests: Sequence[Request], drafter: Drafter, controller: Controller | None = None) -> int:
    """One round of requests on one base: each emits at least one token and leaves nothing pending.

    A request's tokens are those of its rounds alone. Where emitting fails, its `error` says so; the others go on.

    Args:
        controller: may allow less than their bounds.

    Returns:
        Rows verified.
    """
    if not any(request.bounds.max_draft_tokens for request in requests):
        controller = None  # there is nothing to decide
    with _timing(requests, "draft"):
        trees = []
        for request, bounds in zip(requests, _allowed(requests, controller), strict=True):
            request.state.push(request.newest)
            given, emitter = (request.state, drafter.exit_layers, bounds), request.emitter
            trees.append(draft_tree(*given, remaining=emitter.remaining, stop_tokens=emitter.stop_tokens))
        drafts = draft_all(trees, drafter)
    with _timing(requests, "verify"):
        logits = verify_all([request.state for request in requests])
    results = []
    with _timing(requests, "emit"):
        for request, draft, (logits_TV,) in zip(requests, drafts, logits, strict=True):
            try:
                results.append(_emit(request, draft, logits_TV))
            except BaseException as error:  # the user's streamer, criterion or key: it ends this text alone
                request.error = error
    if controller is not None and len(results) == len(requests):  # else its tokens are not known
        _report(requests, drafts, results, controller)
    return sum(logits_1TV.shape[1] for logits_1TV in logits)


def _allowed(requests: Sequence[Request], controller: Controller | None) -> list[SpeculationBounds]:
    """What each request may draft in this round."""
    if controller is not None:
        return controller.begin([request.bounds for request in requests])
    return [request.bounds.among(len(requests)) for request in requests]


def _emit(request: Request, draft: Draft, logits_TV: Tensor) -> Accepted:
    """Accept what the target chooses itself, emit it, settle it, and say what happened."""
    seen: list[int] = []

    def choose(row: int) -> tuple[int, bool]:
        seen.append(row)
        return request.emitter.emit(logits_TV[row : row + 1])

    try:
        result = accept(draft.tokens, draft.parents, choose)
    finally:  # also where a streamer, a criterion or the user interrupts: the cache holds the path so far
        request.state.settle(seen)
    request.newest, request.stopped = result.tokens[-1], result.stopped
    request.stats.record_round(draft.exit_layers, result.drafts, len(result.tokens), hard=draft.hard)
    if request.on_round is not None:
        request.on_round(draft, result)
    return result


def _report(
    requests: Sequence[Request], drafts: Sequence[Draft], results: Sequence[Accepted], controller: Controller
) -> None:
    """Tell the controller what became of the round, and count one in which it rests."""
    pairs = list(zip(drafts, results, strict=True))
    told = [one for draft, result in pairs for one in judged(draft, result)]
    controller.end(told, sum(len(result.tokens) for result in results))
    for request in requests:
        request.stats.resting_rounds += controller.resting > 0 and request.bounds.max_draft_tokens > 0


@contextmanager
def _timing(requests: Sequence[Request], part: str) -> Iterator[None]:
    """Count what is done inside as time of this part, a like share for each request."""
    started = time.perf_counter()
    yield
    share = (time.perf_counter() - started) / len(requests)
    for request in requests:
        request.stats.parts[part] += share  # type: ignore[assignment]


def run_to_end(
    request: Request, prompt_logits: Tensor, drafter: Drafter, controller: Controller | None = None
) -> None:
    """Emit tokens of one request until its emitter stops; raises what that raises.

    Args:
        prompt_logits: target logits [1, V] after the prompt, which its state holds.
    """
    request.begin(prompt_logits)
    while not request.stopped:
        speculate_round([request], drafter, controller)
        if request.error is not None:
            raise request.error
