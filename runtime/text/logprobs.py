"""`LogprobRecorder`: how likely each emitted token was, and which were likeliest. Knows no text and no server.

The scores that it sees are those of plain decoding bit for bit, and so are the figures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities at one position.

    Attributes:
        chosen: of the token that was emitted.
        top: ids and values of the likeliest, in falling order.
    """

    chosen: float
    top: list[tuple[int, float]]


class LogprobRecorder(LogitsProcessor):
    """A logits processor that changes nothing. `generate` runs it before temperature, top-k and top-p.

    Args:
        num_top: so many of the likeliest tokens are kept.
    """

    def __init__(self, num_top: int) -> None:
        self.num_top = num_top
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the scores [1, V] at the next position; they come back as they are."""
        self._scores = scores
        return scores

    def take(self, token: int) -> Logprobs:
        """The figures of the position whose scores were noted last, where this token was chosen."""
        assert self._scores is not None
        values = torch.log_softmax(self._scores[0].float(), dim=-1)
        self._scores = None
        best = values.topk(min(self.num_top, len(values)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Logprobs(float(values[token]), list(top))
