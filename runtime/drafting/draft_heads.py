"""`DraftHeads`: exit heads at work on a base, with the rows they borrow and the way between draft and target ids.

Knows no policy, no cache and no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.drafting.head_memory import HeadMemory
from runtime.drafting.heads import ExitHeads, HeadContext
from runtime.drafting.temperature import likeliest
from runtime.drafting.unembedding import Base, DraftUnembedding


@dataclass(frozen=True, slots=True)
class DraftHeads:
    """Exit heads and what they draft with.

    Shape suffixes: N tokens, D hidden size, V draft vocabulary.

    Attributes:
        exits: the heads; while they are fitted, what accelerate wraps them in.
        unembedding: the base's frozen rows for the draft vocabulary.
        draft_to_target: target id of each draft id, shape [V], int64.
        target_to_draft: the inverse, shape [base's vocabulary], int64; -1 where there is no draft id.
        native: exit layer -> the head in our own kernel, where that takes it.
    """

    exits: Any
    unembedding: DraftUnembedding
    draft_to_target: Tensor
    target_to_draft: Tensor
    native: Mapping[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, exits: ExitHeads, base: Base, draft_to_target: Tensor) -> "DraftHeads":
        """On a base; where the heads draft its whole vocabulary, its rows are used as they are, and not copied."""
        weight: Any = base.unembedding.weight
        size, device = weight.shape[0], weight.device  # a base may have more rows than tokens
        ids = draft_to_target.to(device)
        whole = torch.equal(ids, torch.arange(size, device=device))
        inverse = torch.full((size,), -1, device=device)
        inverse[ids] = torch.arange(len(ids), device=device)
        return cls(exits, DraftUnembedding(base, None if whole else ids), draft_to_target.cpu(), inverse)

    def on(self, base: Base, *, device: torch.device, dtype: torch.dtype) -> "DraftHeads":
        """The heads on another device or in another dtype, the borrowed rows taken anew."""
        return DraftHeads.of(self.exits.to(device=device, dtype=dtype), base, self.draft_to_target)

    def with_exits(self, exits: Any) -> "DraftHeads":
        """Other heads, or wrapped ones, in the place of these."""
        return replace(self, exits=exits, native={})

    @property
    def exit_layers(self) -> list[int]:
        """Ascending."""
        layers: list[int] = self.exits.exit_layers
        return layers

    @property
    def attends(self) -> bool:
        """Whether they have keys of positions before, and so a memory of each request."""
        own: bool = self.exits.one.attends
        return own

    def memory(self, layer: int, memories: dict[int, HeadMemory]) -> HeadMemory:
        """What one exit's head keeps of a request, made where it is not there yet."""
        if layer not in memories:
            memories[layer] = HeadMemory(self.exits.heads[str(layer)], self.unembedding, self.native.get(layer))
        return memories[layer]

    @property
    def modules(self) -> Iterable[nn.Module]:
        """All modules that are not the base's own."""
        yield from self.exits.modules()
        if self.unembedding.is_copy:
            yield self.unembedding.rows

    def __call__(self, hidden: Mapping[int, Tensor], context: HeadContext) -> dict[int, Tensor]:
        """Draft logits of every exit, from hidden states [N, D] by exit layer: exit layer -> [N, V]."""
        logits: dict[int, Tensor] = self.exits(hidden, context, self.unembedding)
        return logits

    def best(
        self, layer: int, hidden: Tensor, context: HeadContext, temperature: float, count: int
    ) -> list[list[tuple[int, float]]]:
        """Target ids and confidences of one exit's likeliest drafts, most confident first; waits for the device once.

        Args:
            hidden: shape [N, D].
            count: drafts for each of the N rows.
        """
        native = self.native.get(layer)
        if native is None:
            return self._likeliest(self.logits(layer, hidden, context), temperature, count)
        count = min(count, len(self.draft_to_target))
        return self._named(*(tensor.tolist() for tensor in native(hidden, context, temperature, count)))

    def of_states(self, layer: int, states: Tensor, temperature: float, count: int) -> list[list[tuple[int, float]]]:
        """As `best`, from states [N, D] of a head that attends."""
        native = self.native.get(layer)
        if native is None:
            return self._likeliest(self.unembedding.of_normed(states), temperature, count)
        count = min(count, len(self.draft_to_target))
        return self._named(*(tensor.tolist() for tensor in native.likeliest(states, temperature, count)))

    def _likeliest(self, logits: Tensor, temperature: float, count: int) -> list[list[tuple[int, float]]]:
        """Target ids and confidences by draft logits [N, V], most confident first; waits for the device once."""
        values, indices = likeliest(logits, temperature, min(count, len(self.draft_to_target)))
        return self._named(*torch.stack([indices.float(), values]).tolist())

    def _named(self, drafts: list[list[float]], chances: list[list[float]]) -> list[list[tuple[int, float]]]:
        """Draft ids as target ids, with their confidences."""
        targets = self.draft_to_target.numpy()[np.array(drafts, dtype=np.int64)].tolist()
        return [list(zip(*row, strict=True)) for row in zip(targets, chances, strict=True)]

    def logits(self, layer: int, hidden: Tensor, context: HeadContext) -> Tensor:
        """Draft logits [N, V] of one exit from hidden states [N, D]."""
        logits: Tensor = self.exits.logits(layer, hidden, context, self.unembedding)
        return logits
