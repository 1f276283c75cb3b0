"""`Batch`: calls of `generate` that run together on one model, each with the ids that it has alone.

Transformers prepares each call (processors, criteria, stop strings, lengths); its prompt is read between rounds, in
parts where that leaves the same bits, and then it decodes with the others. Where KV blocks run out the call that began
last is put out, and resumed as it was when there is room: the oldest one always goes on. Knows no text and no files.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from runtime.batch.admission import Admission
from runtime.batch.call import Call
from runtime.batch.memory import KVMemory, rows_of
from runtime.batch.waiting import wait
from runtime.decoding.engine import Engine
from runtime.errors import ConfigError
from runtime.exact.fingerprint import contents
from runtime.handle import SpecBound

MAX_REQUESTS = 8
# Tokens of prompts that are read between two rounds of those who decode, where parts have the same bits; with fewer
# left than the second the next prompt waits for the next round.
AT_ONCE, FEWEST = 256, 32
# Of those, what an emitted token counts that is read again: they go through the layers in narrower blocks.
AGAIN = 4


class Batch:
    """Calls of `generate` on one model, which belongs to the batch while that is open.

    Args:
        model: with an adapter.
        max_requests: calls that decode together; further ones wait for their turn, first come, first served.
        memory: for keys and values, which calls wait for too; by default half of what is free.

    Attributes:
        calls: that have not begun, and before them those that were put out.
        running: that have begun, the oldest first.
        rows: of the last round: the newest token of each call, and its drafts.
        preempted: calls that were put out in the last round.

    Raises:
        ConfigError: `max_requests` is below 1.
    """

    def __init__(self, model: Any, max_requests: int = MAX_REQUESTS, memory: KVMemory | None = None) -> None:
        if max_requests < 1:
            raise ConfigError(f"max_requests is {max_requests}: expected at least 1")
        self.model, self.max_requests = model, max_requests
        self.specbound: SpecBound = model.specbound
        self.memory, self._lasts = (KVMemory.of(model), False) if memory is None else (memory, True)
        self.calls: deque[Call] = deque()
        self.running: list[Call] = []
        self._admission = Admission(self.memory, self.calls)
        self.rows = self.preempted = 0
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
            if call.generation is not None:
                call.generation.leave_cache()
            call.give_back(self.memory)
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
        self.outside()
        waiting = wait(self.model, input_ids, streamer, seed, kwargs)
        drafts = self.specbound.bounds.max_draft_tokens if speculate else 0
        call = Call(waiting, speculate, drafts, rows_of(waiting.max_length, drafts), time.perf_counter())
        self.memory.check(call.longest)
        self.calls.append(call)
        return call

    def would_begin(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether there are KV blocks for a call of such lengths too, behind those that wait."""
        drafts = self.specbound.bounds.max_draft_tokens
        return self._admission.would_begin(prompt_tokens, max_new_tokens, drafts, self.running, whole=self._whole)

    @property
    def _whole(self) -> bool:
        """Whether calls take all their KV blocks at once: by stock's loop, and over a static cache."""
        certificate = self.specbound.certificate
        static = certificate is not None and certificate.policy.static
        return static or self._reason is not None or not self.specbound.enabled

    def _decodes(self, call: Call) -> bool:
        """Whether all is read that comes before its next token."""
        return call.generation is not None and call.generation.request in self._engine.running

    def _grow(self) -> None:
        """KV blocks for the next round; where there are none left, calls are put out."""
        put_out = self._admission.grow([call for call in self.running if self._decodes(call)], self.running)
        for call in put_out:
            if call.generation is not None:
                self._engine.leave(call.generation.request)
        self.preempted = len(put_out)

    @torch.no_grad()
    def round(self) -> list[Call]:
        """Begin what there is room for, then one round of all; calls that ended."""
        ended = [call for call in (*self.calls, *self.running) if call.cancelled]
        for call in ended:
            self._leave(call)
        begun = [call for call in self.running if not self._decodes(call)]
        whole = self._whole
        while len(self.running) < self.max_requests and (begins := self._admission.next(self.running, whole=whole)):
            self.running.append(begins)
            self._begin(begins)
            begun.append(begins)
        self._read(begun)
        ended += [call for call in begun if call.ended]
        self.rows = 0
        self._grow()
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
        """Make ready to read the prompt; what cannot speculate runs to its end."""
        self.outside()
        try:
            call.begin(self.model, self.specbound, self.memory, self._reason)
        except Exception as error:  # of the call's own streamer, processor or prompt: the others go on
            call.error = error
        if call.output is not None or call.error is not None:
            self._leave(call)

    def _read(self, calls: Sequence[Call]) -> None:
        """Read on in the prompts of calls, the first ones first: `AT_ONCE` tokens of them while others decode."""
        left = AT_ONCE
        for call in calls:
            if call.ended or left < FEWEST:
                continue
            try:
                left -= self._read_on(call, left if self._engine.running else None)
            except Exception as error:  # of the call's own prompt, streamer or processor: the others go on
                call.error = error
                self._leave(call)

    def _read_on(self, call: Call, tokens: int | None) -> int:
        """Read on in a prompt, then in what was emitted before the call was put out; it decodes once all is read.

        Args:
            tokens: as `PromptReading.go_on` takes them.

        Returns:
            How many were read; emitted ones count `AGAIN` times.
        """
        count, generation = 0, call.generation
        if generation is None or generation.is_out:
            assert call.reading is not None
            self.outside()
            count = call.reading.go_on(tokens)
            if call.reading.read is None:
                return count
            generation = call.go_on(self.specbound)
        if generation.missed:
            self._inside()
            count += AGAIN * generation.catch_up(None if tokens is None else max(0, tokens - count) // AGAIN)
        if generation.request.stopped:
            self._leave(call)
        elif not generation.missed:
            self._engine.join(generation.request)
        return count

    def _leave(self, call: Call) -> None:
        """End a call: its cache and output, as `generate` leaves and returns them."""
        call.ended = True
        if call in self.calls:
            self.calls.remove(call)
        if call in self.running:
            self.running.remove(call)
        generation = call.generation
        if generation is not None:
            self._engine.leave(generation.request)
            generation.leave_cache()
        call.give_back(self.memory)
        call.generation = call.reading = None
        if generation is None:
            return
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
