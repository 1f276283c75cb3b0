"""`LogprobRecorder`: how likely each token was, and which were likeliest. Knows no text and no server.

The scores that it sees are those of plain decoding bit for bit, and so are the figures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel


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
        scores, self._scores = self._scores[0], None
        return logprobs_of(scores, token, self.num_top)


def logprobs_of(scores: Tensor, token: int, num_top: int) -> Logprobs:
    """The figures of scores [V] where this token stands."""
    values = torch.log_softmax(scores.float(), dim=-1)
    best = values.topk(min(num_top, len(values)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Logprobs(float(values[token]), list(top))


@torch.no_grad()
def prompt_logprobs(model: PreTrainedModel, prompt: Tensor, num_top: int) -> list[Logprobs]:
    """How likely the model's own forward finds each token of a prompt [1, T] from the second on: T - 1 figures."""
    rows: Tensor = model(prompt).logits[0]
    return [logprobs_of(row, token, num_top) for row, token in zip(rows, prompt[0, 1:].tolist(), strict=False)]
