"""How much of a text the base would have chosen itself, from one forward."""

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def own_tokens(model: Any, rows: Sequence[tuple[list[int], list[int]]], *, among: int = 1) -> tuple[int, int]:
    """Count response tokens that are among the base's likeliest at their places, and all of them.

    Args:
        rows: prompt ids and response ids of each text.
        among: how many of the likeliest; with 1 the base's greedy choice.
    """
    own = total = 0
    for prompt, response in rows:
        if response:
            ids = torch.tensor([[*prompt, *response]], device=model.device)
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            likely = logits.topk(min(among, logits.shape[-1])).indices
            own += int((likely == ids[0, len(prompt) :, None]).any(-1).sum())
            total += len(response)
    return own, total
