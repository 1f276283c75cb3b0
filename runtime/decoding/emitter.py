"""`TargetEmitter`: from target logits to emitted tokens, as transformers' own loop does it.

Processors, the choice, scores, stopping criteria and streamer, one call a token, so that nothing is ever decided
by the block. Knows no drafts and no cache of ours.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from runtime.decoding.families import CACHE


class TargetEmitter:
    """Chooses, records and hands on tokens exactly as stock's loop does, one call a token.

    Args:
        input_ids: prompt, shape [1, T], int64.
        generator: sampled tokens are drawn from; by default torch's own, as stock's are.

    Attributes:
        largest_shift: how far the logits given may be from those of plain decoding; 0 where they are its bits.
        unpromised: tokens that plain decoding may have chosen otherwise for that reason.
        begun: tokens whose choice has begun; one more than `emitted` where a processor failed.
        emitted: tokens so far.
    """

    def __init__(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any,
        generator: torch.Generator | None = None,
    ) -> None:
        self.input_ids: Any = input_ids
        self.processors = logits_processor
        self.criteria = stopping_criteria
        self.streamer = streamer
        self.generator = generator
        self.largest_shift = 0.0
        self.unpromised = 0
        self.begun = 0
        self.emitted = 0
        self.do_sample = generation_config.do_sample
        self.return_dict = generation_config.return_dict_in_generate
        self.scores: Any = () if self._wants(generation_config.output_scores) else None
        self.logits: Any = () if self._wants(generation_config.output_logits) else None
        self.max_length: int = stopping_criteria.max_length or generation_config.max_length
        eos = getattr(generation_config, "_eos_token_tensor", None)
        self.stop_tokens: Collection[int] = frozenset() if eos is None else frozenset(eos.tolist())

    def _wants(self, output: bool | None) -> bool:
        return bool(self.return_dict and output)

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted before the length limit."""
        return self.max_length - int(self.input_ids.shape[1])

    def emit(self, logits: Tensor) -> tuple[int, bool]:
        """Choose the next token from target logits [1, V] on the text so far; whether generation stops with it."""
        self.begun += 1
        logits = logits.to(copy=True, dtype=torch.float32, device=self.input_ids.device)
        scores: Any = self.processors(self.input_ids, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.do_sample:
            chances = nn.functional.softmax(scores, dim=-1)
            token = torch.multinomial(chances, num_samples=1, generator=self.generator).squeeze(1)
        else:
            token = _best(scores)
        if self.largest_shift > 0 and self.emitted > 0:  # the first comes from the prompt's own forward: exact
            self.unpromised += self.do_sample or self._near_tie(scores)
        self.emitted += 1
        self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
        stop = bool(self.criteria(self.input_ids, self.scores).max())
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return int(token), stop

    def _near_tie(self, scores: Tensor) -> bool:
        """Whether the two best of [1, V] could change places: each may have moved by `largest_shift`."""
        best, second = scores.topk(2).values[0].tolist()
        return bool(best - second <= 2 * self.largest_shift)

    def finish(self, cache: DynamicCache) -> GenerateDecoderOnlyOutput | Tensor:
        """End the stream; what `generate` returns."""
        if self.streamer is not None:
            self.streamer.end()
        sequences: Tensor = self.input_ids
        if not self.return_dict:
            return sequences
        kept: dict[str, Any] = {CACHE: cache}
        return GenerateDecoderOnlyOutput(sequences=self.input_ids, scores=self.scores, logits=self.logits, **kept)


def _best(scores: Tensor) -> Tensor:
    """`torch.argmax` of scores [1, V], shape [1]: the first of equal ones. On a CPU NumPy is 25 times as fast."""
    plain = type(scores) is Tensor and scores.dtype == torch.float32 and scores.device.type == "cpu"
    if not plain or scores.requires_grad or scores.is_neg():
        return torch.argmax(scores, dim=-1)
    return torch.from_numpy(scores.numpy().argmax(-1))
