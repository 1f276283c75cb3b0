"""`Call`: one call of `generate` in a batch, from its turn in the queue to what it returns. Knows no other call."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from runtime.batch.generation import Generation
from runtime.batch.memory import KVMemory, rows_of
from runtime.batch.reading import PromptReading
from runtime.batch.waiting import Waiting, run_plain
from runtime.decoding.cache import blocks_of, first_blocks, grown
from runtime.decoding.emitter import TargetEmitter
from runtime.decoding.families import CACHE
from runtime.handle import SpecBound
from runtime.stats import SpeculationStats


@dataclass(slots=True, eq=False)
class Call:
    """One call of `generate` in a batch.

    Attributes:
        waiting: what stock has prepared.
        speculate: False where it is to draft nothing.
        drafts: that a round of it may have at most.
        longest: rows of keys that it takes at most, those of drafts too.
        added: when, by `time.perf_counter`.
        output: what `generate` returns; None until it has ended, and where it was cancelled before it began.
        error: what its streamer, processor or criterion raised.
        stats: counts of its rounds; None where it ran by stock's loop.
        cancelled: set by whoever no longer wants it: it ends with the next round.
        ended: whether it has an output or an error, or was cancelled.
        emitter: once it has begun.
        reading: of its prompt, until it decodes.
        generation: once its prompt was read, also while it is put out.
        blocks: KV blocks that it has taken.
        times_out: how often it was put out.
    """

    waiting: Waiting
    speculate: bool
    drafts: int
    longest: int
    added: float
    output: Any = None
    error: BaseException | None = None
    stats: SpeculationStats | None = None
    cancelled: bool = False
    ended: bool = False
    emitter: TargetEmitter | None = None
    reading: PromptReading | None = None
    generation: Generation | None = None
    blocks: int = 0
    times_out: int = 0

    def first_blocks(self, *, whole: bool) -> int:
        """KV blocks with which it begins, or goes on after it was put out.

        With `whole`, and where it runs by stock's loop, all that it may ever need.
        """
        if whole or self.waiting.reason is not None:
            return blocks_of(self.longest)
        tokens = self.waiting.prompt_tokens + (0 if self.emitter is None else self.emitter.emitted)
        return first_blocks(rows_of(tokens, self.drafts), self.longest)

    @property
    def may_grow(self) -> bool:
        """Whether it may need more KV blocks than it has."""
        return self.blocks < blocks_of(self.longest)

    def grow(self, memory: KVMemory) -> bool:
        """Take KV blocks for the next round, and some for those after it, where they are free; whether it has them."""
        assert self.generation is not None
        cache, drafts = self.generation.cache, self.generation.request.bounds.max_draft_tokens
        needed = blocks_of(rows_of(cache.get_seq_length(), drafts))
        if needed <= self.blocks:
            return True
        for blocks in (grown(self.blocks, needed, blocks_of(self.longest)), needed):
            if memory.take(blocks - self.blocks):
                self.blocks = cache.blocks = blocks
                return True
        return False

    def put_out(self, memory: KVMemory) -> None:
        """Leave its KV blocks to others, to begin again when there is room."""
        self.give_back(memory)
        self.times_out += 1

    def give_back(self, memory: KVMemory) -> None:
        """Its KV blocks, and drop what lies in them."""
        memory.give_back(self.blocks)
        self.blocks = 0
        if self.generation is not None:
            self.generation.put_out()
        elif self.reading is not None:
            self.reading.drop()

    def begin(self, model: Any, specbound: SpecBound, memory: KVMemory, reason: str | None) -> None:
        """Make ready to read the prompt, again where it was put out; or run it whole, by stock's loop.

        Args:
            reason: why no call can speculate.
        """
        input_ids, processors, criteria, config, _, streamer = self.waiting.given
        reason, model_kwargs = reason or self.waiting.reason, self.waiting.model_kwargs
        if self.generation is None and (reason is not None or not specbound.enabled):
            if specbound.enabled:
                specbound.warn_plain(str(reason))
            self.output = run_plain(model, self.waiting)
            return
        if self.emitter is None:
            self.emitter = TargetEmitter(input_ids, processors, criteria, config, streamer, self.waiting.generator)
        elif self.reading is None:
            model_kwargs = model_kwargs | {CACHE: DynamicCache(config=model.config)}
        if self.reading is None:
            given = input_ids, config, model_kwargs
            self.reading = PromptReading(model, specbound.prepared, specbound.drafter.watched, given, memory)

    def go_on(self, specbound: SpecBound) -> Generation:
        """Decode from now on, the prompt being read: emit the first token, or be resumed after it was put out."""
        assert self.emitter is not None and self.reading is not None
        reading, first = self.reading, self.generation is None
        if self.generation is None:
            bounds = specbound.certified_bounds
            bounds = replace(bounds, max_draft_tokens=min(self.drafts, bounds.max_draft_tokens))
            self.generation = Generation.of(specbound, self.emitter, reading, bounds, self.blocks)
        else:
            self.generation.resume(reading, self.blocks)
        if not self.generation.keeps_cache:  # else the prompt's rows are there still, for the caller and for us
            self.reading = None
        request = self.generation.request
        self.stats = request.stats
        if first:
            request.begin(self.generation.prompt_logits)
        elif reading.stats is not self.stats:
            self.stats.parts["prompt"] += reading.stats.parts["prompt"]
        return self.generation


def generated(call: Call) -> list[int]:
    """The ids that a call generated, its prompt left out; raises what the call raised."""
    if call.error is not None:
        raise call.error
    if call.output is None:
        return []
    sequences: Tensor = getattr(call.output, "sequences", call.output)
    return sequences[0, call.waiting.given[0].shape[1] :].tolist()
