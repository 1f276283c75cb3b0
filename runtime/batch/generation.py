"""`Generation`: one call of `generate` under way, from its prompt to what it returns. Knows no other call.

One that is put out has dropped its keys and values. It is resumed as it was: its prompt is read again, and the tokens
that it has emitted go through the layers as rows, each of which has the bits of one-token decoding (so has every row
that a round leaves). What is emitted with, and what was counted, stays.
"""

import time
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from runtime.batch.memory import rows_of
from runtime.batch.reading import PromptReading
from runtime.decoding.cache import BLOCK_TOKENS, KVCache, first_blocks
from runtime.decoding.emitter import TargetEmitter
from runtime.decoding.families import CACHE
from runtime.decoding.request import Request
from runtime.decoding.state import DecodeState
from runtime.drafting.policy import SpeculationBounds
from runtime.exact.prepared import PreparedModel
from runtime.handle import SpecBound

# New tokens that a static cache has room for from its start: what was recorded over it is lost when it grows.
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
    prepared: PreparedModel
    cache: KVCache
    stock_cache: DynamicCache
    prompt_length: int
    keeps_cache: bool

    @classmethod
    def of(
        cls,
        specbound: SpecBound,
        emitter: TargetEmitter,
        reading: PromptReading,
        bounds: SpeculationBounds,
        blocks: int | None = None,
    ) -> "Generation":
        """Go on from a prompt that is read; `specbound` is ready for the model as it is.

        Args:
            bounds: of its rounds.
            blocks: KV blocks that its cache begins with; by default one for the answer beside the prompt's.
        """
        prepared = specbound.prepared
        assert prepared.certificate is not None and reading.read is not None
        emitter.largest_shift = prepared.certificate.largest_shift
        _, generation_config, model_kwargs = reading.given
        stock_cache: DynamicCache = model_kwargs[CACHE]
        keeps_cache = generation_config.return_dict_in_generate or getattr(stock_cache, "_is_user_defined", False)
        prompt_length = stock_cache.get_seq_length()
        most = rows_of(prompt_length + emitter.remaining, bounds.max_draft_tokens)
        state = _state_after(reading, prepared, most, blocks, keeps_cache=bool(keeps_cache))
        on_round = getattr(emitter.streamer, "end_round", None)  # a streamer may ask what became of the drafts
        request = Request(state, bounds, emitter, reading.stats, on_round)
        return cls(
            request, emitter, reading.read.logits, reading.started, prepared, state.cache, stock_cache, prompt_length,
            bool(keeps_cache),
        )  # fmt: skip

    @property
    def is_out(self) -> bool:
        """Whether its keys and values are dropped, those of its prompt too."""
        return not self.cache.get_seq_length()

    def put_out(self) -> None:
        """Drop keys and values, and all that only drafts are made of."""
        layers = self.request.state.layers
        self.cache = KVCache(layers.num_layers, 0)
        self.request.state = DecodeState(layers, self.cache, ())

    def resume(self, reading: PromptReading, blocks: int) -> None:
        """Take keys and values of its prompt, which is read again; those of emitted tokens are for `catch_up`.

        Args:
            blocks: KV blocks that its cache has room for.
        """
        bounds = self.request.bounds
        most = rows_of(self.prompt_length + self.emitter.emitted + self.emitter.remaining, bounds.max_draft_tokens)
        state = _state_after(reading, self.prepared, most, blocks, keeps_cache=self.keeps_cache)
        self.request.state, self.cache = state, state.cache

    @property
    def missed(self) -> list[int]:
        """Emitted tokens that lack keys and values, but for the newest, which the next round takes."""
        known = self.cache.get_seq_length() - self.prompt_length
        emitted: list[int] = self.emitter.input_ids[0, -self.emitter.emitted :].tolist()
        return emitted[known:-1]

    def catch_up(self, tokens: int | None = None) -> int:
        """Let so many of the missed tokens, or all, through the layers, the model computing blocks; how many did."""
        certificate = self.prepared.certificate
        assert certificate is not None
        with self.request.stats.timing("prompt"):
            missed = self.missed[:tokens]
            for first in range(0, len(missed), certificate.max_width):
                self.request.state.read(missed[first : first + certificate.max_width])
        return len(missed)

    def leave_cache(self) -> None:
        """Leave in the caller's cache the rows that stock would have left, also where the call was interrupted.

        One that is put out leaves those of its prompt, which are there.
        """
        if self.keeps_cache and not self.is_out:
            self.cache.crop(self.prompt_length + max(0, self.emitter.begun - 1))
            self.cache.copy_to(self.stock_cache)

    def finish(self) -> GenerateDecoderOnlyOutput | Tensor:
        """End the stream and the counts; what `generate` returns."""
        stats = self.request.stats
        stats.unpromised = self.emitter.unpromised
        stats.seconds = time.perf_counter() - self.started
        return self.emitter.finish(self.stock_cache)


def _state_after(
    reading: PromptReading, prepared: PreparedModel, most: int, blocks: int | None, *, keeps_cache: bool
) -> DecodeState:
    """Cache and state of a prompt that is read.

    Args:
        most: rows of its cache at most.
        blocks: KV blocks that this begins with.
        keeps_cache: what the prompt's forward left stays where it is.
    """
    (input_ids, _, model_kwargs), read = reading.given, reading.read
    assert read is not None and prepared.certificate is not None
    stock_cache: DynamicCache = model_kwargs[CACHE]
    prompt_length = stock_cache.get_seq_length()
    positions = model_kwargs.get("position_ids")
    after = prompt_length if positions is None else position_after(positions)
    assert after is not None
    if prepared.certificate.policy.static:
        rows = min(most, prompt_length + AHEAD)
    else:
        rows = BLOCK_TOKENS * (first_blocks(prompt_length, most) if blocks is None else blocks)
    cache = prepared.cache_of(stock_cache, rows)
    cache.most = most
    if not keeps_cache:
        stock_cache.layers.clear()  # the prompt's rows are copied
    ids = input_ids[0].tolist()
    return DecodeState(prepared.layers, cache, ids, prompt=read.states, position_offset=after - prompt_length)


def position_after(positions: Tensor) -> int | None:
    """Position of the token after a prompt; None where it has several.

    Args:
        positions: shape [1, T]; of a prompt with images [3, 1, T], or [4, 1, T], where the first axis turns nothing.
    """
    last: list[int] = positions.reshape(-1, positions.shape[-1])[-3:, -1].tolist()
    return last[0] + 1 if len(set(last)) == 1 else None
