"""`ReadPrompt`: what a prompt's own forward leaves, for every call that asks the same prompt. Knows no call.

An identical prompt leaves identical bits. A shorter part of it does not: where it is cut, kernels may add in another
order.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from runtime.batch.memory import KVMemory
from runtime.decoding.layers import PromptStates
from runtime.exact.prepared import PreparedModel


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """What the forward of a prompt left.

    Attributes:
        logits: of the target after it, shape [1, V].
        layers: of transformers' cache; nobody writes into their tensors.
        states: that heads read.
    """

    logits: Tensor
    layers: list[Any]
    states: PromptStates

    @classmethod
    def of(
        cls,
        model: Any,
        prepared: PreparedModel,
        watched: Sequence[int],
        given: tuple[Tensor, GenerationConfig, dict[str, Any]],
        memory: KVMemory | None,
    ) -> "tuple[ReadPrompt, bool]":
        """Read a prompt into the cache among its arguments, or take what was kept of it; whether it was kept.

        Args:
            prepared: the model as it is: of another one nothing is kept.
            watched: exit layers whose heads read of the prompt.
            given: what stock's `_prefill` takes.
            memory: where it is kept; None keeps nothing.
        """
        cache: DynamicCache = given[2]["past_key_values"]
        key = None if memory is None else _key(*given)
        if memory is not None and key is not None:
            key = (prepared.layers, *watched, *key)
            found = memory.find(key)
            if found is not None:
                cache.layers[:] = map(copy.copy, found.layers)
                return found, True
        with prepared.layers.watching(watched) as states, prepared.reading():
            outputs = model._prefill(*given)
        read = cls(outputs.logits[:, -1].clone(), [copy.copy(layer) for layer in cache.layers], states)
        if memory is not None and key is not None:
            memory.keep(key, cache.get_seq_length(), read)
        return read, False


def _key(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the forward of a prompt depends on, besides the model; None where that is more than its ids."""
    embeds, positions = model_kwargs.get("inputs_embeds"), model_kwargs.get("position_ids")
    if embeds is not None or config.prefill_chunk_size is not None or model_kwargs["past_key_values"].get_seq_length():
        return None
    return tuple(input_ids[0].tolist()), None if positions is None else tuple(positions.flatten().tolist())
