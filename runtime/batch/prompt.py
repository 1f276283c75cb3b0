"""`ReadPrompt`: what a prompt's own forward leaves, for every call that asks the same prompt. Knows no call.

An identical prompt leaves identical bits. One that begins alike does for as many tokens as `PromptLayers.common` says:
then the others are read alone. The first of a kind is read whole as well, and compared.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

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

    @classmethod
    def of(
        cls, model: Any, prepared: PreparedModel, watched: Sequence[int], given: Given, memory: KVMemory | None
    ) -> "tuple[ReadPrompt, int]":
        """Read a prompt into the cache among its arguments, or take what was kept; how many tokens were taken.

        Args:
            prepared: the model as it is: of another one nothing is kept.
            watched: exit layers whose heads read of the prompt.
            given: what stock's `_prefill` takes.
            memory: where it is kept; None keeps nothing.
        """
        cache: DynamicCache = given[2][CACHE]
        key = None if memory is None else _key(model, *given)
        if memory is None or key is None:
            return cls._whole(model, prepared, watched, given), 0
        key = ((prepared.layers, *watched), *key)
        found = memory.find(key)
        if found is not None:
            cache.layers[:] = map(copy.copy, found.layers)
            return found, given[0].shape[1]
        beginning = _beginning(prepared, key, memory)
        if beginning is None:
            read, taken = cls._whole(model, prepared, watched, given), 0
        else:
            read, taken = cls._rest(model, prepared, watched, given, beginning), beginning[1]
            if not cls._is_proven(model, prepared, given, read, beginning[2]):
                cache.layers[:] = DynamicCache(config=model.config).layers
                read, taken = cls._whole(model, prepared, watched, given), 0
        memory.keep(key, cache.get_seq_length(), read)
        return read, taken

    @classmethod
    def _whole(cls, model: Any, prepared: PreparedModel, watched: Sequence[int], given: Given) -> "ReadPrompt":
        """Read all of it."""
        with prepared.layers.watching(watched) as states, prepared.reading():
            outputs = model._prefill(*given)
        return cls._left(outputs, given, states)

    @classmethod
    def _is_proven(cls, model: Any, prepared: PreparedModel, given: Given, read: "ReadPrompt", length: int) -> bool:
        """Whether a prompt read behind another of so many tokens has every bit of the whole: looked at once a kind."""
        assert prepared.prompts is not None
        prefixes = prepared.prompts.prefixes
        kind = prefixes.kind(length, given[0].shape[1])
        if kind not in prefixes.proven:
            given = (*given[:2], given[2] | {CACHE: DynamicCache(config=model.config)})
            whole = cls._whole(model, prepared, (), given)
            prefixes.proven[kind] = all(map(torch.equal, read.tensors, whole.tensors))
        return prefixes.proven[kind]

    @property
    def tensors(self) -> list[Tensor]:
        """Logits, keys and values."""
        return [self.logits, *(tensor for layer in self.layers for tensor in (layer.keys, layer.values))]

    @classmethod
    def _rest(
        cls,
        model: Any,
        prepared: PreparedModel,
        watched: Sequence[int],
        given: Given,
        beginning: "tuple[ReadPrompt, int, int]",
    ) -> "ReadPrompt":
        """Read what follows the tokens taken from another prompt, of so many tokens."""
        earlier, taken, length = beginning
        input_ids, cache = given[0], given[2][CACHE]
        total = input_ids.shape[1]
        cache.layers[:] = map(copy.copy, earlier.layers)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :taken], layer.values[:, :, :taken]
        positions = torch.arange(taken, total, device=input_ids.device)[None]
        others = {"position_ids": positions, CACHE: cache, "use_cache": True, "logits_to_keep": 1}
        with prepared.layers.watching(watched) as states, prepared.reading(total):
            outputs = model(input_ids=input_ids[:, taken:], **others)
        states.follow(earlier.states, length - taken)
        return cls._left(outputs, given, states)

    @classmethod
    def _left(cls, outputs: Any, given: Given, states: PromptStates) -> "ReadPrompt":
        layers = given[2][CACHE].layers
        return cls(outputs.logits[:, -1].clone(), [copy.copy(layer) for layer in layers], states)


def _beginning(
    prepared: PreparedModel, key: tuple[Any, ...], memory: KVMemory
) -> "tuple[ReadPrompt, int, int] | None":
    """A kept prompt, of how many tokens its rows can be taken, and how many it has: that of which most can be."""
    kind, ids, positions = key
    if prepared.prompts is None or not _counts_up(positions):
        return None
    kept = [(other[1], read) for other, read in memory.items() if other[0] == kind and _counts_up(other[2])]
    alike = [(min(_alike(ids, other), len(ids) - 1), len(other), read) for other, read in kept]
    best: tuple[ReadPrompt, int, int] | None = None
    for number, length, read in sorted(alike, key=lambda one: -one[0])[:TRIED]:
        most = 0 if best is None else best[1]
        taken = prepared.prompts.common(length, len(ids), number) if number > most else 0
        if taken > most:
            best = read, taken, length
    return best


def _counts_up(positions: tuple[int, ...] | None) -> bool:
    return positions is None or positions == tuple(range(len(positions)))


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens with which both begin."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _key(
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
