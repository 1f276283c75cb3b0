"""The draft vocabulary: the tokens a head can draft, those the base chose most often. Knows no model."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def draft_vocabulary(responses: Iterable[Sequence[int]], *, size: int, vocab_size: int, keep: Iterable[int]) -> Tensor:
    """Target ids of the draft vocabulary, ascending.

    Args:
        responses: response token ids of the fit split.
        size: tokens wanted; 0 or at least `vocab_size` for all of them.
        vocab_size: of the base.
        keep: ids that must be in it (ends of text).

    Returns:
        `draft_to_target`, shape [size], int64. Where fewer tokens were ever chosen, the lowest ids fill it
        up.
    """
    if size == 0 or size >= vocab_size:
        return torch.arange(vocab_size)
    counts = Counter(token for response in responses for token in response)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    chosen = dict.fromkeys([*keep, *ranked, *range(vocab_size)])
    return torch.tensor(sorted(list(chosen)[:size]), dtype=torch.int64)


def coverage(responses: Iterable[Sequence[int]], draft_to_target: Tensor) -> float:
    """Share of response tokens that the draft vocabulary holds."""
    known = set(draft_to_target.tolist())
    tokens = [token in known for response in responses for token in response]
    return sum(tokens) / max(1, len(tokens))
