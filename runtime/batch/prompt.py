"""`ReadPrompt`: what a prompt's own forward leaves, for every call that asks the same prompt. Knows no call.

An identical prompt leaves identical bits. One that begins alike does for as many tokens as `PromptLayers.common` says.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from runtime.batch.memory import KVMemory
from runtime.decoding.families import CACHE
from runtime.decoding.wrappers import prompt_arguments
from runtime.drafting.prompt_states import PromptStates
from runtime.exact.prepared import PreparedModel

Given = tuple[Tensor, GenerationConfig, dict[str, Any]]
TRIED = 4  # kept prompts, those with the longest common beginning: to look at one takes some milliseconds


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

    @property
    def tensors(self) -> list[Tensor]:
        """Logits, keys and values."""
        return [self.logits, *(tensor for layer in self.layers for tensor in (layer.keys, layer.values))]


def beginning(prepared: PreparedModel, key: tuple[Any, ...], memory: KVMemory) -> "tuple[ReadPrompt, int, int] | None":
    """A kept prompt, of how many tokens its rows can be taken, and how many it has: that of which most can be."""
    kind, ids, positions = key
    if prepared.prompts is None or not counts_up(positions):
        return None
    kept = [(other[1], read) for other, read in memory.items() if other[0] == kind and counts_up(other[2])]
    alike = [(min(_alike(ids, other), len(ids) - 1), len(other), read) for other, read in kept]
    best: tuple[ReadPrompt, int, int] | None = None
    for number, length, read in sorted(alike, key=lambda one: -one[0])[:TRIED]:
        most = 0 if best is None else best[1]
        taken = prepared.prompts.common(length, len(ids), number) if number > most else 0
        if taken > most:
            best = read, taken, length
    return best


def counts_up(positions: tuple[int, ...] | None) -> bool:
    """Whether a prompt's positions are those of its tokens."""
    return positions is None or positions == tuple(range(len(positions)))


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens with which both begin."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def key_of(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """What the forward of a prompt depends on, besides the model; None where that is more than its ids."""
    more = {"inputs_embeds", *prompt_arguments(model.config)}  # pictures, for instance
    if any(model_kwargs.get(name) is not None for name in more) or config.prefill_chunk_size is not None:
        return None
    if model_kwargs[CACHE].get_seq_length():
        return None
    positions = model_kwargs.get("position_ids")
    return tuple(input_ids[0].tolist()), None if positions is None else tuple(positions.flatten().tolist())
