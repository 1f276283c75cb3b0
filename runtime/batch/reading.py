"""`PromptReading`: a prompt's own forward under way, whole or in parts, or what is left of it behind another prompt.

Parts leave the bits of the whole where `PromptLayers.in_parts` says so, which is looked at once, on the beginning of a
prompt. Elsewhere one that is read behind another's beginning is, the first of its kind, read whole as well. Knows no
call.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from runtime.batch.memory import KVMemory
from runtime.batch.prompt import Given, ReadPrompt, beginning, counts_up, key_of
from runtime.decoding.families import CACHE
from runtime.drafting.prompt_states import PromptStates
from runtime.exact.native.prompt import NotInParts
from runtime.exact.prepared import PreparedModel
from runtime.stats import SpeculationStats

LEAST = 32  # tokens at the end of a prompt that are read together: torch takes some of them together
LOOKED_AT = 96  # tokens of a prompt that are read whole and in parts


class PromptReading:
    """Reads a prompt into the cache among its arguments.

    Args:
        prepared: the model as it is: of another one nothing is kept.
        watched: exit layers whose heads read of the prompt.
        given: what stock's `_prefill` takes.
        memory: where it is kept; None keeps nothing.

    Attributes:
        read: what it left; None until all of it is read.
        started: when, by `time.perf_counter`.
        stats: its time, and how many tokens were taken of another.
    """

    def __init__(
        self, model: Any, prepared: PreparedModel, watched: Sequence[int], given: Given, memory: KVMemory | None
    ) -> None:
        self.model, self.prepared, self.watched, self.given = model, prepared, watched, given
        self.memory = memory
        self.cache: DynamicCache = given[2][CACHE]
        self.total = int(given[0].shape[1])
        self.read: ReadPrompt | None = None
        self.started, self.stats = time.perf_counter(), SpeculationStats()
        self._done = 0
        self._states: PromptStates | None = None  # of what is read
        key = key_of(model, *given)
        self._key = None if key is None else ((prepared.layers, *watched), *key)
        self._earlier: int | None = None  # tokens of the prompt whose beginning was taken
        self._begun = False

    def go_on(self, tokens: int | None = None) -> int:
        """Read so many more tokens where it may be read in parts, else all that is left; how many were read."""
        with self.stats.timing("prompt"):
            return self._go_on(tokens)

    def _go_on(self, tokens: int | None) -> int:
        if not self._begun:
            self._find()
        if self.read is not None:
            return 0
        end = self.total
        if tokens is not None and self._done + tokens <= self.total - LEAST and self._in_parts():
            end = self._done + tokens
        count = end - self._done
        try:
            outputs = self._part(end) if self._done or end < self.total else self._whole()
        except NotInParts:
            self._start_anew()
            count, outputs = self.total, self._whole()
        if self._done == self.total:
            self._end(outputs)
        return count

    def _find(self) -> None:
        """Take what is kept of it, or of a prompt that begins alike."""
        self._begun = True
        if self.memory is None or self._key is None:
            return
        found = self.memory.find(self._key)
        if found is not None:
            self.cache.layers[:] = map(copy.copy, found.layers)
            self.read, self.stats.reused = found, self.total
            return
        alike = beginning(self.prepared, self._key, self.memory)
        if alike is not None:
            earlier, self._done, length = alike
            self._earlier = length
            layers: list[Any] = [copy.copy(layer) for layer in earlier.layers]
            self.cache.layers[:] = layers
            for layer in layers:
                layer.keys, layer.values = layer.keys[:, :, : self._done], layer.values[:, :, : self._done]
            self._states, self.stats.reused = earlier.states.without(length - self._done), self._done

    def drop(self) -> None:
        """Forget what was read so far; when it goes on it begins again."""
        if self._begun and self._key is not None:  # else it was not read in parts
            self._start_anew()
            self._begun = False

    def _start_anew(self) -> None:
        """Forget what was read."""
        self.cache.layers[:] = DynamicCache(config=self.model.config).layers
        self._earlier, self._states, self._done, self.stats.reused = None, None, 0, 0

    def _whole(self) -> Any:
        """Read all of it, as stock does."""
        with self.prepared.layers.watching(self.watched) as self._states, self.prepared.reading():
            outputs = self.model._prefill(*self.given)
        self._done = self.total
        return outputs

    def _part(self, end: int) -> Any:
        """Read on, up to token `end`."""
        positions = torch.arange(self._done, end, device=self.given[0].device)[None]
        others = {"position_ids": positions, CACHE: self.cache, "use_cache": True, "logits_to_keep": 1}
        with self.prepared.layers.watching(self.watched) as states, self.prepared.reading(self.total):
            outputs = self.model(input_ids=self.given[0][:, self._done : end], **others)
        if self._states is not None:
            states.follow(self._states)
        self._states, self._done = states, end
        return outputs

    def _end(self, outputs: Any) -> None:
        """Keep it, if it has the bits of the whole; keys and values that are not kept are the cache's alone."""
        self.read = self._left(outputs)
        if self._earlier is not None and not self._is_proven(self._earlier, self.read):
            self._start_anew()
            self.read = self._left(self._whole())
        memory, key = self.memory, self._key
        if memory is None or key is None or not memory.keep(key, self.cache.get_seq_length(), self.read):
            self.read = replace(self.read, layers=[])

    def _left(self, outputs: Any) -> ReadPrompt:
        """What is there after the last token."""
        assert self._states is not None
        layers = [copy.copy(layer) for layer in self.cache.layers]
        return ReadPrompt(outputs.logits[:, -1].clone(), layers, self._states)

    def _is_proven(self, length: int, read: ReadPrompt) -> bool:
        """Whether what was read behind another of so many tokens has every bit of the whole: looked at once a kind."""
        assert self.prepared.prompts is not None
        prefixes = self.prepared.prompts.prefixes
        if prefixes.are_known(length, self.total):
            return self._in_parts()
        kind = prefixes.kind(length, self.total)
        if kind not in prefixes.proven:
            whole = self._other(self.given[0])
            prefixes.proven[kind] = _same(read, whole._left(whole._whole()))
        return prefixes.proven[kind]

    def _in_parts(self) -> bool:
        """Whether it may be read in parts: looked at once, on the beginning of a prompt, whole and in two parts."""
        prompts, key = self.prepared.prompts, self._key
        if prompts is None or key is None or not counts_up(key[2]) or not prompts.in_parts(self.total):
            return False
        kind = prompts.prefixes.kind(self.total, self.total)
        if kind not in prompts.prefixes.proven:
            ids = self.given[0].repeat(1, -(-LOOKED_AT // self.total))[:, :LOOKED_AT]
            whole, parts = self._other(ids), self._other(ids)
            parts._part(LOOKED_AT // 2 + 5)
            same = _same(whole._left(whole._part(LOOKED_AT)), parts._left(parts._part(LOOKED_AT)))
            prompts.prefixes.proven[kind] = same and prompts.in_parts(LOOKED_AT)
        return prompts.prefixes.proven[kind]

    def _other(self, ids: Tensor) -> "PromptReading":
        """Of such tokens, into a cache of its own, kept nowhere."""
        model_kwargs = self.given[2] | {CACHE: DynamicCache(config=self.model.config)}
        return PromptReading(self.model, self.prepared, (), (ids, self.given[1], model_kwargs), None)


def _same(one: ReadPrompt, other: ReadPrompt) -> bool:
    return all(map(torch.equal, one.tensors, other.tensors))
