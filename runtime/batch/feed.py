"""`stream`: requests taken as they come and told as they are written, each with the ids that it has alone."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from runtime.batch.call import Call
from runtime.batch.calls import MAX_REQUESTS, Batch

# Until a source that had nothing is asked again, where nothing else is to be done.
PAUSE_SECONDS = 0.001


class Piece(NamedTuple):
    """What a round gave a request.

    Attributes:
        number: of the request, from 0, in the order they came.
        ids: that are new.
        ended: whether it is the request's last piece.
        error: what ended it, where it failed; the others go on.
    """

    number: int
    ids: list[int]
    ended: bool
    error: BaseException | None = None


def stream(
    model: Any,
    requests: Iterable[Sequence[int] | Mapping[str, Any] | None],
    *,
    max_requests: int = MAX_REQUESTS,
) -> Iterator[Piece]:
    """Decode requests together while they are fed; the model belongs to this until the iterator ends or is closed.

    Args:
        model: with an adapter.
        requests: each the ids of a prompt, or a dictionary of `input_ids` and what `Batch.add` takes: options of
            `generate`, `seed`, `speculate`. One is taken when there is a place for it. None says that there is none
            at the moment: the others go on.
        max_requests: that decode together.
    """
    source, more, count = iter(requests), True, 0
    calls: dict[Call, tuple[int, int]] = {}  # number, and tokens told
    with Batch(model, max_requests) as batch:
        while more or calls:
            while more and len(calls) < batch.max_requests:
                request: Any = next(source, StopIteration)
                more = request is not StopIteration
                if not more or request is None:
                    break
                count += 1
                try:
                    calls[_add(batch, request)] = (count - 1, 0)
                except Exception as error:  # its own: the others go on
                    yield Piece(count - 1, [], True, error)
            if calls:
                batch.round()
            elif more:
                time.sleep(PAUSE_SECONDS)
            for call, (number, told) in tuple(calls.items()):
                ids = _ids(call)[told:]
                calls[call] = (number, told + len(ids))
                if call.ended:
                    del calls[call]
                if ids or call.ended:
                    yield Piece(number, ids, call.ended, call.error)


def _add(batch: Batch, request: Sequence[int] | Mapping[str, Any]) -> Call:
    options: dict[str, Any] = dict(request) if isinstance(request, Mapping) else {"input_ids": request}
    ids = torch.as_tensor(options.pop("input_ids"), device=batch.model.device).reshape(1, -1)
    return batch.add(ids, **{"attention_mask": torch.ones_like(ids)} | options)


def _ids(call: Call) -> list[int]:
    """Ids of a call so far, its prompt left out."""
    prompt: Any = call.waiting.given[0]
    if call.generation is not None:
        text = call.generation.emitter.input_ids
    elif call.output is not None:
        text = getattr(call.output, "sequences", call.output)
    else:
        return []
    return text[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]
