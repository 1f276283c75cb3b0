"""Compare stock `generate` and SpecBound on the same model: speed, and whether the ids are identical.

Times on shared machines drift. Therefore both run on each prompt in turn, and the speed-up is the median of the
ratios of each pair.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.conditions import conditions
from runtime.stats import SpeculationStats


@dataclass(slots=True)
class Comparison:
    """Totals over prompts, each generated with stock `generate` and with SpecBound.

    Attributes:
        stock_seconds, specbound_seconds: one entry per prompt.
        identical: whether both gave the same ids, one entry per prompt.
        stats: SpecBound's statistics, summed over prompts.
    """

    stock_seconds: list[float] = field(default_factory=list)
    specbound_seconds: list[float] = field(default_factory=list)
    identical: list[bool] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def speedup(self) -> float:
        """Median over prompts of stock's seconds divided by SpecBound's."""
        pairs = zip(self.stock_seconds, self.specbound_seconds, strict=True)
        return statistics.median(stock / ours for stock, ours in pairs)

    def report(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the figures as JSON values, with the machine and settings they were measured on."""
        tokens = self.stats.emitted
        layers = sorted(self.stats.drafted)
        return {
            "prompts": len(self.identical),
            "tokens": tokens,
            "identical_prompts": sum(self.identical),
            "stock_tokens_per_second": tokens / sum(self.stock_seconds),
            "specbound_tokens_per_second": tokens / sum(self.specbound_seconds),
            "speedup": self.speedup,
            "mean_accepted_length": self.stats.mean_accepted_length,
            "acceptance_rate": self.stats.acceptance_rate,
            "exits": {
                str(layer): {"drafted": self.stats.drafted[layer], "accepted": self.stats.accepted[layer]}
                for layer in layers
            },
            **conditions(model.device, model.dtype),
        }


def compare(model: Any, prompts: Sequence[Tensor], **options: Any) -> Iterator[Comparison]:
    """Generate from every prompt with and without SpecBound; yields the totals so far after each prompt.

    Args:
        model: as `load_specbound` returns it.
        prompts: token ids, each of shape [1, T], int64.
        options: passed to both calls of `generate`.
    """
    totals = Comparison()
    specbound = model.specbound
    generate: Callable[..., Tensor] = model.generate
    generate(
        prompts[0], **{**options, "min_new_tokens": 4, "max_new_tokens": 4}
    )  # warm-up, since first calls allocate memory
    for number, prompt in enumerate(prompts):
        seconds, outputs = {}, {}
        for speculate in (False, True) if number % 2 == 0 else (True, False):
            started = time.perf_counter()
            with nullcontext() if speculate else specbound.disabled():
                outputs[speculate] = generate(prompt, **options)
            seconds[speculate] = time.perf_counter() - started
        totals.stock_seconds.append(seconds[False])
        totals.specbound_seconds.append(seconds[True])
        totals.identical.append(torch.equal(outputs[False], outputs[True]))
        totals.stats += specbound.stats
        yield totals
