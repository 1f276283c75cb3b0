"""`Call`: one call of `generate` in a batch, from its turn in the queue to what it returns. Knows no other call."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from runtime.batch.generation import Generation
from runtime.batch.reading import PromptReading
from runtime.batch.waiting import Waiting
from runtime.decoding.emitter import TargetEmitter
from runtime.decoding.request import Request
from runtime.handle import SpecBound
from runtime.stats import SpeculationStats


@dataclass(slots=True, eq=False)
class Call:
    """One call of `generate` in a batch.

    Attributes:
        waiting: what stock has prepared.
        output: what `generate` returns; None until it has ended, and where it was cancelled before it began.
        error: what its streamer, processor or criterion raised.
        speculate: False where it is to draft nothing.
        added: when, by `time.perf_counter`.
        stats: counts of its rounds; None where it ran by stock's loop.
        cancelled: set by whoever no longer wants it: it ends with the next round.
        ended: whether it has an output or an error, or was cancelled.
        emitter, reading: once it has begun; its prompt is read, whole or in parts.
        generation: while it decodes.
        tokens: whose keys and values it needs room for.
        has_room: whether that is taken.
    """

    waiting: Waiting
    speculate: bool
    added: float
    output: Any = None
    error: BaseException | None = None
    stats: SpeculationStats | None = None
    cancelled: bool = False
    ended: bool = False
    emitter: TargetEmitter | None = None
    reading: PromptReading | None = None
    generation: Generation | None = None
    tokens: int = 0
    has_room: bool = False

    def start(self, specbound: SpecBound) -> Request:
        """The first token, when the prompt is read; what decodes with the others from now on."""
        assert self.emitter is not None and self.reading is not None
        self.generation = Generation.of(specbound, self.emitter, self.reading)
        request = self.generation.request
        if not self.speculate:
            request.bounds = replace(request.bounds, max_draft_tokens=0)
        self.stats = request.stats
        request.begin(self.generation.prompt_logits)
        return request


def generated(call: Call) -> list[int]:
    """The ids that a call generated, its prompt left out; raises what the call raised."""
    if call.error is not None:
        raise call.error
    if call.output is None:
        return []
    sequences: Tensor = getattr(call.output, "sequences", call.output)
    return sequences[0, call.waiting.given[0].shape[1] :].tolist()
