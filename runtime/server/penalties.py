"""`CountPenalties`: OpenAI's presence and frequency penalties, which transformers does not have."""

import torch
from torch import Tensor
from transformers import LogitsProcessor


class CountPenalties(LogitsProcessor):
    """Takes from the scores of ids that the answer has already; those of the prompt do not count.

    Args:
        prompt_tokens: so many ids are the prompt's.
        presence: taken once from each id that is there.
        frequency: taken as often as the id is there.
    """

    def __init__(self, prompt_tokens: int, *, presence: float, frequency: float) -> None:
        self.prompt_tokens = prompt_tokens
        self.presence = presence
        self.frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] at the next position of the ids [B, T]."""
        answer = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts
