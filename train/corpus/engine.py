"""`EngineAnswerer`: answers prompts together, each as the base alone answers it. Knows no files and no splits."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runtime.batch import Batch, Call, generated
from runtime.decoding.drafter import NoDrafter
from runtime.drafting.policy import MAX_ROWS, SpeculationBounds
from runtime.errors import UnsupportedModel
from runtime.exact.native.library import native_library
from runtime.generate import attach, detach
from runtime.handle import SpecBound
from train.corpus.answers import Answerer, Done, Told, Turn
from train.corpus.options import CorpusOptions


class EngineAnswerer(Answerer):
    """An `Answerer` without padding: an answer does not depend on what is answered beside it.

    It is that of `generate`, greedy, or sampled under a seed of the turn's own. As one ends the next begins.

    Args:
        specbound: of the model, drafting nothing.
    """

    def __init__(self, model: Any, tokenizer: Any, options: CorpusOptions, specbound: SpecBound) -> None:
        super().__init__(model, tokenizer, options)
        self.specbound = specbound

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, options: CorpusOptions, *, fingerprint: str = ""
    ) -> "EngineAnswerer | None":
        """None where answers that are made together would not share the weights: padded batches are faster there."""
        if hasattr(model, "specbound") or not _may_share(model):
            return None
        bounds = SpeculationBounds(2.0, 0, MAX_ROWS - 1)
        try:
            specbound = SpecBound(model, NoDrafter(), bounds, fingerprint=fingerprint or None)
        except UnsupportedModel:
            return None
        return cls(model, tokenizer, options, specbound) if _shares(specbound, model) else None

    def answer_all(self, batches: Mapping[str, Sequence[Turn]], done: Done, told: Told | None = None) -> None:
        """Answer all turns, `batch_size` at a time, whichever batch they are of."""
        waiting = deque((name, place) for name, batch in batches.items() for place in range(len(batch)))
        answers: dict[str, dict[int, list[int]]] = {name: {} for name in batches}
        asked: dict[Call, tuple[str, int]] = {}
        attach(self.model, self.specbound)
        try:
            with Batch(self.model, self.options.batch_size) as batch:
                while waiting or asked:
                    while waiting and len(asked) < batch.max_requests:
                        name, place = waiting.popleft()
                        asked[self._ask(batch, batches[name][place])] = name, place
                    for call in batch.round():
                        name, place = asked.pop(call)
                        answers[name][place] = ids = generated(call)
                        if len(answers[name]) == len(batches[name]):
                            done(name, [each for _, each in sorted(answers.pop(name).items())])
                        if told is not None:
                            told([ids], "")
        finally:
            detach(self.model)

    def _ask(self, batch: Batch, turn: Turn) -> Call:
        """Put a turn among those that are answered."""
        seed = self.seed(f"{turn.prompt.hash} {len(turn.messages)}")
        mask = torch.ones(1, len(turn.prompt_ids), dtype=torch.int64)
        return batch.add(turn.prompt_ids, seed=seed, speculate=False, attention_mask=mask, **self.how(turn))


def _may_share(model: Any) -> bool:
    """Whether the kernels that let requests share the weights may run the model: cheap to ask."""
    return model.device.type == "cpu" and model.dtype == torch.bfloat16 and native_library() is not None


def _shares(specbound: SpecBound, model: Any) -> bool:
    """Whether they do, with every bit."""
    if specbound.why_stock(model) is not None or specbound.certificate is None:
        return False
    return specbound.certificate.policy.native
