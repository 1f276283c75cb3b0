"""`Batch`: calls of `generate` that run together on one model, each with the ids that it has alone.

Transformers prepares each call (processors, criteria, stop strings, lengths); its prompt is read between rounds, in
parts where that leaves the same bits, and then it decodes with the others. Knows no text and no files.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from runtime.batch.call import Call
from runtime.batch.memory import KVMemory, rows_of
from runtime.batch.reading import PromptReading
from runtime.batch.waiting import Waiting, run_plain
from runtime.decoding.emitter import TargetEmitter
from runtime.decoding.engine import Engine
from runtime.errors import ConfigError
from runtime.exact.fingerprint import contents
from runtime.handle import SpecBound

MAX_REQUESTS = 8
# Tokens of prompts that are read between two rounds of those who decode, where parts have the same bits; with fewer
# left than the second the next prompt waits for the next round.
AT_ONCE, FEWEST = 256, 32


class Batch:
    """Calls of `generate` on one model, which belongs to the batch while that is open.

    Args:
        model: with an adapter.
        max_requests: calls that decode together; further ones wait for their turn, first come, first served.
        memory: for keys and values, which calls wait for too; by default half of what is free.

    Attributes:
        rows: of the last round: the newest token of each call, and its drafts.

    Raises:
        ConfigError: `max_requests` is below 1.
    """

    def __init__(self, model: Any, max_requests: int = MAX_REQUESTS, memory: KVMemory | None = None) -> None:
        if max_requests < 1:
            raise ConfigError(f"max_requests is {max_requests}: expected at least 1")
        self.model, self.max_requests = model, max_requests
        self.specbound: SpecBound = model.specbound
        self.memory, self._lasts = (KVMemory.of(model), False) if memory is None else (memory, True)
        self.calls: deque[Call] = deque()  # that have not begun
        self.running: list[Call] = []
        self.rows = 0
        self._engine = Engine(self.specbound.drafter)
        self._reason: str | None = None  # why none of them can speculate
        self._held, self._blocks = ExitStack(), ExitStack()

    def __enter__(self) -> "Batch":
        with ExitStack() as held:  # given back where the probe fails or is interrupted
            held.enter_context(self.specbound.prepared.exclusive(speculating=True))
            if self.specbound.enabled:
                self._reason = self.specbound.why_stock(self.model)
            self._held = held.pop_all()
        self._engine = Engine(self.specbound.drafter, self.specbound.controller)  # made ready for the model as it is
        if self._lasts and not self.memory.sole:  # others may have filled it, from other weights
            self.memory.belong_to(contents(self.model))
        certificate = self.specbound.certificate
        if certificate is not None and certificate.policy.static:  # there is one static cache
            self.max_requests = 1
        return self

    def __exit__(self, *_: object) -> None:
        for call in (*self.calls, *self.running):
            self._free(call)
        self._blocks.close()
        self._held.close()

    def add(
        self,
        input_ids: Any,
        *,
        streamer: Any = None,
        seed: int | None = None,
        speculate: bool = True,
        **kwargs: Any,
    ) -> Call:
        """Add a call; it begins in one of the next rounds.

        Args:
            input_ids: ids of the prompt, a list or shape [1, T].
            streamer: told each token as stock tells it.
            seed: of its own random numbers: it samples what `generate` samples after `torch.manual_seed(seed)`.
            speculate: False drafts nothing for it.
            kwargs: as `generate` takes them.

        Raises:
            ConfigError: it is for beam search or assisted decoding, or longer than all keys and values may be.
            ValueError: what `generate` itself refuses.
        """
        ids = torch.as_tensor(input_ids, device=self.model.device)
        ids = ids[None] if ids.dim() == 1 else ids
        waiting = Waiting(streamer, seed, ids.device)
        self.outside()
        config = kwargs.get("generation_config") or self.model.generation_config
        if (kwargs.get("num_beams") or config.num_beams or 1) > 1:
            raise ConfigError("a batch takes greedy decoding and sampling: call generate itself for beam search")
        if self.model.generate(ids, streamer=waiting, **kwargs) is not waiting:
            raise ConfigError("a batch takes greedy decoding and sampling: call generate itself for other modes")
        call = Call(waiting, speculate, time.perf_counter(), tokens=self.tokens_of(waiting.max_length))
        self.memory.check(call.tokens)
        if len(self.calls) + len(self.running) < self.max_requests and all(other.has_room for other in self.calls):
            self._has_room(call)  # at once, so that who asks next is told
        self.calls.append(call)
        return call

    def tokens_of(self, length: int) -> int:
        """Tokens that a call needs room for, of so many of prompt and answer: as many, and its drafts."""
        return rows_of(length, self.specbound.bounds.max_draft_tokens)

    def _has_room(self, call: Call) -> bool:
        """Take room for a call where there is and it has none; whether it has."""
        call.has_room = call.has_room or self.memory.take(call.tokens)
        return call.has_room

    def _free(self, call: Call) -> None:
        """Give back the room that a call has."""
        if call.has_room:
            self.memory.give_back(call.tokens)
            call.has_room = False

    @torch.no_grad()
    def round(self) -> list[Call]:
        """Begin what there is room for, then one round of all; calls that ended."""
        ended = [call for call in (*self.calls, *self.running) if call.cancelled]
        for call in ended:
            self._leave(call)
        begun = [call for call in self.running if call.generation is None]
        while self.calls and len(self.running) < self.max_requests and self._has_room(self.calls[0]):
            call = self.calls.popleft()
            self.running.append(call)
            self._begin(call)
            begun.append(call)
        self._read(begun)
        ended += [call for call in begun if call.ended]
        self.rows = 0
        if not self._engine.running:
            return ended
        self._inside()
        by_request = {id(call.generation.request): call for call in self.running if call.generation is not None}
        for request in self._engine.round():
            call = by_request[id(request)]
            call.error = request.error
            self._leave(call)
            ended.append(call)
        self.rows = self._engine.rows
        return ended

    def _begin(self, call: Call) -> None:
        """Make ready to read the prompt; all of it, by stock's loop, where the call cannot speculate."""
        input_ids, processors, criteria, config, _, streamer = call.waiting.given
        self.outside()
        reason = self._reason or call.waiting.reason
        try:
            if reason is not None or not self.specbound.enabled:
                if self.specbound.enabled:
                    self.specbound.warn_plain(str(reason))
                call.output = run_plain(self.model, call.waiting)
                self._leave(call)
                return
            call.emitter = TargetEmitter(input_ids, processors, criteria, config, streamer, call.waiting.generator)
            given = call.emitter.input_ids, config, call.waiting.model_kwargs
            watched = self.specbound.drafter.watched
            call.reading = PromptReading(self.model, self.specbound.prepared, watched, given, self.memory)
        except Exception as error:  # of the call's own streamer, processor or prompt: the others go on
            call.error = error
            self._leave(call)

    def _read(self, calls: Sequence[Call]) -> None:
        """Read on in the prompts of calls, the first ones first: `AT_ONCE` tokens of them while others decode."""
        left = AT_ONCE
        for call in calls:
            if call.ended or call.reading is None or left < FEWEST:
                continue
            self.outside()
            try:
                left -= call.reading.go_on(left if self._engine.running else None)
                if call.reading.read is not None:
                    self._engine.join(call.start(self.specbound))
            except Exception as error:  # of the call's own prompt, streamer or processor: the others go on
                call.error = error
                self._leave(call)

    def _leave(self, call: Call) -> None:
        """End a call: its cache and output, as `generate` leaves and returns them."""
        call.ended = True
        self._free(call)
        if call in self.calls:
            self.calls.remove(call)
        if call in self.running:
            self.running.remove(call)
        if call.generation is None:
            return
        generation, call.generation = call.generation, None
        if generation.request in self._engine.running:
            self._engine.running.remove(generation.request)
        generation.leave_cache()
        if call.error is None:
            try:
                call.output = generation.finish()
            except Exception as error:  # of the call's own streamer
                call.error = error
        self.specbound.stats = generation.request.stats

    def _inside(self) -> None:
        """The model computes blocks."""
        if not self.specbound.prepared.runs:
            self._blocks.enter_context(self.specbound.prepared.running(self.model))

    def outside(self) -> None:
        """Let the model compute as stock's until the next round."""
        self._blocks.close()
        self._blocks = ExitStack()
