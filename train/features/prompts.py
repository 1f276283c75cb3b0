"""`Prompts`: hidden states of the base at the positions before the responses, for heads that attend; `whole_texts`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from runtime.drafting.exit_head import PROMPT_TOKENS as PROMPT_TOKENS
from runtime.drafting.exit_head import WholeTexts


@dataclass(frozen=True, slots=True)
class Prompts:
    """M prompt positions of some texts, in order: up to the one before the first response position.

    Attributes:
        hidden: exit layer -> hidden states, shape [M, D].
        embedding: hidden states at depth 0, shape [M, D].
        deep: the base's last hidden states, after the final norm, shape [M, D].
        lengths: positions of each text, summing to M.
    """

    hidden: dict[int, Tensor]
    embedding: Tensor
    deep: Tensor
    lengths: list[int]


def whole_texts(
    prompts: Prompts, hidden: Mapping[int, Tensor], embedding: Tensor, deep: Tensor, lengths: Sequence[int]
) -> WholeTexts:
    """Join prompts and responses, text by text.

    Args:
        hidden, embedding, deep, lengths: as in `Features`, of the response positions.
    """

    def joined(prompt: Tensor, response: Tensor) -> Tensor:
        """Shape [B, S, D]."""
        pairs = zip(prompt.split(prompts.lengths), response.split(list(lengths)), strict=True)
        return pad_sequence([torch.cat(pair) for pair in pairs], batch_first=True)

    starts, number = torch.tensor(prompts.lengths, device=deep.device), torch.tensor(lengths, device=deep.device)
    places = torch.arange(max(lengths), device=deep.device)
    return WholeTexts(
        hidden={layer: joined(prompts.hidden[layer], states) for layer, states in hidden.items()},
        embedding=joined(prompts.embedding, embedding),
        deep=pad(joined(prompts.deep, deep), (0, 0, 1, 0))[:, :-1],
        start=starts,
        chosen=places < number[:, None],
    )
