"""Measures a cost table: what the parts of a round cost on this machine, in this dtype and exactness mode.

All parts are measured in turn, many times, so that a busy moment affects them equally; each mean is over the middle
half of the times. The context gets a few tokens shorter each time, because the cost of attention depends on where in a
vector a block of rows begins. Needs no policy.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import trim_mean
from tqdm import trange
from transformers import DynamicCache

from runtime.conditions import hardware
from runtime.decoding.cache import KVCache
from runtime.decoding.families import CACHE
from runtime.decoding.state import DecodeState
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import SpecBoundError
from runtime.exact.static import StaticCache
from runtime.handle import SpecBound
from train.replay.clock import Clock
from train.replay.contention import Contention
from train.replay.costs import CostTable
from train.replay.search import WIDTHS

CONTEXTS = (64, 384, 1024)
REPEATS = 9
WARM_UP = 2
TRIMMED = 0.25  # this share of the times at either end is left out of a mean
SHORTER = 5  # tokens by which the context shrinks each time, so that every alignment occurs
GENERATED = 8
# One token more than the widest draft that is tried; the costs of other widths lie on the lines between these.
MAX_WIDTH = max(WIDTHS) + 1
MEASURED = (1, 2, 3, 4, 6, 8, 12, 16)
SIBLINGS = 8  # tokens that a head is asked for together
SECONDS = 120.0  # a large base takes long: no round begins that would end later, but for the second


@torch.no_grad()
def measure(
    model: Any,
    *,
    max_width: int = MAX_WIDTH,
    repeats: int = REPEATS,
    progress: bool = True,
) -> CostTable:
    """Measure the cost table of a model with an adapter.

    Args:
        max_width: widest block measured, in tokens.
        repeats: rounds of measurements, fewer where they take longer than `SECONDS`.

    Raises:
        SpecBoundError: the model does not speculate on this machine.
    """
    specbound: SpecBound = model.specbound
    if (reason := specbound.why_stock(model)) is not None:
        raise SpecBoundError(f"no round can be timed, because this model decodes plainly here: {reason}")
    rounds = WARM_UP + repeats
    longer = SHORTER * (rounds // 2)  # tokens more at the start, so that the average context is as asked
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXTS[-1] * 2
    contexts = [min(context, longest - GENERATED - max_width - 1 - longer) for context in CONTEXTS]
    benches = [_Bench(model, context, longer, max_width) for context in contexts]
    measured: list[dict[Any, float]] = []
    started, contention = time.perf_counter(), Contention()
    for number in trange(rounds, desc="profile", unit="round", disable=not progress):
        if number >= 2 and (time.perf_counter() - started) * (number + 1) / number > SECONDS:
            break
        measured.append({})
        for bench in benches:
            timed = bench.gaps()
            with specbound.prepared.running(model):
                timed |= bench.sources() | bench.blocks()
            # Subtracted within a round, because the machine's speed drifts from one round to the next.
            timed["rest", None, bench.context] = timed.pop(("alone", None, bench.context)) - sum(
                timed[name, 1, bench.context] for name in ("layers", "unembedding")
            )
            measured[-1] |= timed
            bench.shorten()
    kept = measured[min(WARM_UP, len(measured) // 2) :]
    ms = {key: 1000 * float(trim_mean([each[key] for each in kept], TRIMMED)) for key in kept[0]}
    return contention.told(_table(ms, contexts, max_width, specbound, model))


def _table(ms: dict[Any, float], contexts: list[int], max_width: int, specbound: SpecBound, model: Any) -> CostTable:
    """Build the table: lines over the contexts, non-decreasing over the widths, per layer and per token."""
    num_layers = specbound.prepared.layers.num_layers
    widths = _widths(max_width)
    for name, context in product(("layers", "unembedding"), contexts):  # noise: cost does not fall with more tokens
        rising = isotonic_regression([ms[name, width, context] for width in widths]).x
        ms |= {(name, width, context): float(value) for width, value in zip(widths, rising, strict=True)}

    def line(name: str, width: int | None = None) -> tuple[float, float]:
        costs = [ms[name, width, context] for context in contexts]
        slope, base = np.polyfit(contexts, costs, 1) if len(set(contexts)) > 1 else (0.0, statistics.mean(costs))
        if slope < 0:  # noise: cost does not fall as a text grows
            slope, base = 0.0, statistics.mean(costs)
        return max(0.0, float(base)), float(slope)

    layers = {width: line("layers", width) for width in widths}
    unembedding = {
        width: statistics.mean(ms["unembedding", width, context] for context in contexts) for width in widths
    }
    plain, plain_context = line("stock")
    token = ms["choose", None, contexts[0]]
    certificate, heads = specbound.certificate, getattr(specbound.drafter, "heads", None)
    assert certificate is not None
    return CostTable(
        num_hidden_layers=num_layers,
        layer={width: base / num_layers for width, (base, _) in layers.items()},
        layer_context={width: slope / num_layers for width, (_, slope) in layers.items()},
        unembedding=unembedding,
        **{name: _mean(ms, name) for name in ("head", "head_row", "lookup")},
        token=token,
        round=max(0.0, statistics.median(ms["rest", None, context] for context in contexts) - token),
        plain=plain,
        plain_context=plain_context,
        conditions={
            "hardware": hardware(model.device),
            "dtype": certificate.dtype,
            "threads": certificate.threads,
            "exactness": specbound.exactness,
            "versions": certificate.versions,
            "contexts": contexts,
            **({"graphs": True} if certificate.policy.static else {}),
            **({"head_weights": heads.exits.one.weights_read} if heads is not None else {}),
        },
    )


def _mean(ms: dict[Any, float], part: str) -> float:
    """Mean over exits and contexts; 0 where there is no such part."""
    values = [value for (name, *_), value in ms.items() if name == part]
    return max(0.0, statistics.mean(values)) if values else 0.0


class _Bench:
    """All measurements after a context of one length; each method returns seconds by what was timed.

    Args:
        longer: tokens above that length at the start; each `shorten` removes some.
    """

    def __init__(self, model: Any, context: int, longer: int, max_width: int) -> None:
        self.model, self.context, self.max_width = model, context, max_width
        self.length = length = context + longer
        self.specbound: SpecBound = model.specbound
        self.layers = self.specbound.prepared.layers
        generator = torch.Generator().manual_seed(0)
        self.vocab_size: int = model.config.get_text_config().vocab_size
        ids = torch.randint(self.vocab_size, (1, length + max_width), generator=generator)
        self.token_ids = ids.to(model.device)
        stock = DynamicCache()
        with self.layers.watching(self.specbound.drafter.watched) as self.prompt:
            model(input_ids=self.token_ids[:, :length], use_cache=True, **{CACHE: stock})
        certificate = self.specbound.certificate
        kind = StaticCache if certificate is not None and certificate.policy.static else KVCache
        self.cache = kind.from_dynamic(stock, length + max_width + 1)

    def shorten(self) -> None:
        """Shorten the context by `SHORTER` tokens."""
        self.length = max(1, self.length - SHORTER)
        self.cache.crop(self.length)

    @torch.inference_mode()
    def blocks(self) -> dict[Any, float]:
        """Time all layers, and the unembedding, at each width."""
        seconds = {}
        for width in _widths(self.max_width):
            ids = self.token_ids[:, self.length : self.length + width]
            block = self.layers.embed(ids, self.length), 0, self.layers.num_layers, self.length, self.cache
            run = partial(self.layers.run, *block, tokens=ids[0].tolist())
            seconds["layers", width, self.context], hidden = self._timed(run)
            self.cache.crop(self.length)
            seconds["unembedding", width, self.context], _ = self._timed(partial(self.layers.logits, hidden))
        return seconds

    def sources(self) -> dict[Any, float]:
        """Time asking each source for drafts, of one token and of several."""
        ids = self.token_ids[0, : self.length].tolist()
        state = DecodeState(self.layers, self.cache, ids, prompt=self.prompt)
        drafter, newest = self.specbound.drafter, int(self.token_ids[0, self.length])
        seconds: dict[Any, float] = {}
        count = self.specbound.bounds.max_branches
        for layer in drafter.exit_layers:
            if layer in drafter.watched:  # its head reads the prompt, once
                state.push(newest)
                state.advance(layer)
                drafter.propose(layer, state, [0], count)
                state.settle([])
            state.push(newest)
            state.advance(layer)
            ask, _ = self._timed(partial(drafter.propose, layer, state, [0], count))
            if layer == 0:
                seconds["lookup", layer, self.context] = ask
            else:
                seconds["head", layer, self.context] = ask
                nodes = [state.push(newest, 0) for _ in range(min(SIBLINGS, self.max_width - 1))]
                state.advance(layer)
                together, _ = self._timed(partial(drafter.propose, layer, state, nodes, count))
                seconds["head_row", layer, self.context] = (together - ask) / max(1, len(nodes) - 1)
            state.settle([])
        return seconds

    def gaps(self) -> dict[Any, float]:
        """Time the gap between tokens of stock `generate` and of rounds without drafts, and choosing one token."""
        specbound = self.specbound
        # The width stays the same, so that the certificate stays valid.
        idle = SpeculationBounds(2.0, specbound.bounds.max_exit_layer, specbound.bounds.max_draft_tokens)
        with specbound.using(bounds=idle, controller=None):
            alone = self._gap()
            choose = specbound.stats.parts["emit"] / specbound.stats.rounds
        with specbound.disabled():
            stock = self._gap()
        where = None, self.context
        return {("stock", *where): stock, ("alone", *where): alone, ("choose", *where): choose}

    def _gap(self) -> float:
        clock = Clock()
        never = self.vocab_size  # `min_new_tokens` would add a logits processor to every token
        options = {"max_new_tokens": GENERATED, "eos_token_id": never, "do_sample": False, "pad_token_id": 0}
        prompt = self.token_ids[:, : self.length]
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
        return statistics.median(late - early for early, late in zip(clock.times[1:-1], clock.times[2:], strict=True))

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds that a call takes, including its work on the device, and its result."""
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started, result


def _widths(most: int) -> list[int]:
    """Numbers of tokens in a block that are measured."""
    return sorted({*(width for width in MEASURED if width < most), most})
