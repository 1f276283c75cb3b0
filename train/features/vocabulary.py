"""The draft vocabulary: the tokens that a head can draft, which are those the base chose most often."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def draft_vocabulary(responses: Iterable[Sequence[int]], *, size: int, vocab_size: int, keep: Iterable[int]) -> Tensor:
    """Target ids of the draft vocabulary, ascending.

    Args:
        responses: response token ids of the fit split.
        size: number of tokens; 0 or at least `vocab_size` for all of them.
        vocab_size: size of the base's vocabulary.
        keep: ids that must be in it (end-of-sequence tokens).

    Returns:
        `draft_to_target`, shape [size], int64. If the responses hold fewer tokens, the lowest other ids fill it.
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


def vocabulary_line(
    draft_to_target: Tensor, covered: float, rows: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> str:
    """What to say of a draft vocabulary, beside the number of different tokens that the answers of the fit hold."""
    different = len({token for _, response in rows for token in response})
    return (
        f"draft vocabulary: {len(draft_to_target)} tokens, {100 * covered:.1f} % of held-out text;"
        f" the fit split has {different} different tokens"
    )
