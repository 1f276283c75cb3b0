"""Plain `generate` against SpecBound on the same model, side by side, with the ids compared inside the timed run.

Times on shared machines drift, so each prompt is run both ways in turn, and the speed-up is the median of the
pairs' ratios. Knows no files.
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
    """Totals over prompts, each generated both ways.

    Attributes:
        stock_seconds, specbound_seconds: one entry a prompt.
        identical: whether the prompt's ids are equal.
        stats: of SpecBound, summed.
    """

    stock_seconds: list[float] = field(default_factory=list)
    specbound_seconds: list[float] = field(default_factory=list)
    identical: list[bool] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def speedup(self) -> float:
        """Median over prompts of stock's seconds / SpecBound's."""
        pairs = zip(self.stock_seconds, self.specbound_seconds, strict=True)
        return statistics.median(stock / ours for stock, ours in pairs)

    def report(self, model: PreTrainedModel) -> dict[str, Any]:
        """The figures as JSON, with what they were taken on."""
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
    """Generate from every prompt both ways; yields the totals so far after each.

    Args:
        model: as `load_specbound` returns it.
        prompts: token ids, each of shape [1, T], int64.
        options: passed to `generate` both times.
    """
    totals = Comparison()
    specbound = model.specbound
    generate: Callable[..., Tensor] = model.generate
    generate(
        prompts[0], **{**options, "min_new_tokens": 4, "max_new_tokens": 4}
    )  # warm-up: the first calls pay for allocations
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
