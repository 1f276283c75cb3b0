"""`Generation`: one call of `generate` under way, from its prompt to what it returns. Knows no other call."""

import time
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from runtime.batch.memory import rows_of
from runtime.batch.reading import PromptReading
from runtime.decoding.cache import KVCache
from runtime.decoding.emitter import TargetEmitter
from runtime.decoding.families import CACHE
from runtime.decoding.request import Request
from runtime.decoding.state import DecodeState
from runtime.handle import SpecBound

# New tokens that a cache has room for from its start.
AHEAD = 1024


@dataclass(slots=True)
class Generation:
    """One call of `generate` whose prompt went through the stock forward.

    Attributes:
        request: for rounds.
        prompt_logits: target logits [1, V] after the prompt.
        started: when it began, by `time.perf_counter`.
    """

    request: Request
    emitter: TargetEmitter
    prompt_logits: Tensor
    started: float
    cache: KVCache
    stock_cache: DynamicCache
    prompt_length: int
    keeps_cache: bool

    @classmethod
    def of(cls, specbound: SpecBound, emitter: TargetEmitter, reading: PromptReading) -> "Generation":
        """Go on from a prompt that is read; `specbound` is ready for the model as it is."""
        bounds, prepared = specbound.certified_bounds, specbound.prepared
        assert prepared.certificate is not None and reading.read is not None
        emitter.largest_shift = prepared.certificate.largest_shift
        (_, generation_config, model_kwargs), read, stats = reading.given, reading.read, reading.stats
        stock_cache: DynamicCache = model_kwargs[CACHE]
        keeps_cache = generation_config.return_dict_in_generate or getattr(stock_cache, "_is_user_defined", False)
        prompt_length, drafts = stock_cache.get_seq_length(), bounds.max_draft_tokens
        kv = prepared.cache_of(stock_cache, prompt_length + min(emitter.remaining, AHEAD) + drafts)
        kv.most = rows_of(prompt_length + emitter.remaining, drafts)
        if not keeps_cache:
            stock_cache.layers.clear()  # the prompt's rows are copied
        positions = model_kwargs.get("position_ids")
        after = prompt_length if positions is None else position_after(positions)
        assert after is not None
        offset = after - prompt_length
        ids = emitter.input_ids[0].tolist()
        state = DecodeState(prepared.layers, kv, ids, prompt=read.states, position_offset=offset)
        on_round = getattr(emitter.streamer, "end_round", None)  # a streamer may ask what became of the drafts
        request = Request(state, bounds, emitter, stats, on_round)
        return cls(request, emitter, read.logits, reading.started, kv, stock_cache, prompt_length, bool(keeps_cache))

    def leave_cache(self) -> None:
        """Leave in the caller's cache the rows that stock would have left, also where the call was interrupted."""
        if self.keeps_cache:
            self.cache.crop(self.prompt_length + max(0, self.emitter.begun - 1))
            self.cache.copy_to(self.stock_cache)

    def finish(self) -> GenerateDecoderOnlyOutput | Tensor:
        """End the stream and the counts; what `generate` returns."""
        stats = self.request.stats
        stats.unpromised = self.emitter.unpromised
        stats.seconds = time.perf_counter() - self.started
        return self.emitter.finish(self.stock_cache)


def position_after(positions: Tensor) -> int | None:
    """Position of the token after a prompt; None where it has several.

    Args:
        positions: shape [1, T]; of a prompt with images [3, 1, T], or [4, 1, T], where the first axis turns nothing.
    """
    last: list[int] = positions.reshape(-1, positions.shape[-1])[-3:, -1].tolist()
    return last[0] + 1 if len(set(last)) == 1 else None
