"""Models whose layers run as segments, for the tests of `runtime/exact/static.py` and `runtime/exact/graphs.py`."""

from typing import Any

import torch
from transformers import DynamicCache

from runtime import SpeculationBounds
from runtime.decoding.cache import KVCache
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.static import StaticCache
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.speculation import NEW_TOKENS

STATIC = ExecutionPolicy("batched", static=True, expert_rows=None)
ORDINARY = ExecutionPolicy("batched", expert_rows=None)
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def attached(model: Any, truth: torch.Tensor, *, exactness: str = "batched", width: int = 4) -> SpecBound:
    """Heads that are right two times of three, at three exits, and graphs switched on."""
    heads = FakeHeads("mixed", [1, 2, 3], truth[0].tolist(), vocabulary=model.config.vocab_size)
    specbound = SpecBound(model, heads, SpeculationBounds(0.4, 3, width), exactness=exactness)
    specbound.prepared.graphs = True
    attach(model, specbound)
    return specbound


def same_ids(model: Any, ids: torch.Tensor, **options: Any) -> bool:
    """Whether the model that heads are attached to generates what it does without, with heads that know it."""
    specbound = model.specbound
    with specbound.disabled():
        torch.manual_seed(3)
        stock = model.generate(ids, **options)
    specbound.drafter.truth = stock[0].tolist()
    torch.manual_seed(3)
    return torch.equal(model.generate(ids, **options), stock)


def prefilled(model: Any, ids: torch.Tensor) -> DynamicCache:
    """What the prompt's forward leaves."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, use_cache=True, **{CACHE: cache})
    return cache


def in_blocks(model: Any, cache: KVCache, ids: torch.Tensor, first: int, widths: list[int]) -> list[torch.Tensor]:
    """Hidden states at the top of blocks of these widths, each run to depth 1, then to the top."""
    layers, found, policy = DecoderLayers(model), [], STATIC if isinstance(cache, StaticCache) else ORDINARY
    with torch.no_grad(), execution(model, policy):
        for width in widths:
            hidden = layers.embed(ids[:, first : first + width], first)
            hidden = layers.run(layers.run(hidden, 0, 1, first, cache), 1, layers.num_layers, first, cache)
            found.append(hidden)
            first += width
    return found
