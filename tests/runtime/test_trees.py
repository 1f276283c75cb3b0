"""Draft trees: whatever is drafted, on whatever branches, the ids are those of stock `generate`."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import runtime.decoding.rounds
from runtime import SpeculationBounds, detach
from runtime.decoding.accept import Accepted
from runtime.decoding.cache import KVCache
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.rows import TreeRows
from runtime.decoding.state import DecodeState
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.native.attend import ORDERS, attend
from runtime.exact.native.library import why_not_native
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.stats import SpeculationStats
from tests.helpers.families import FAMILIES, VOCABULARY, prompt, tiny

NEW = 26


class Siblings:
    """Drafts `count` tokens behind every token, all equally sure; the right one is at `place`, or is none of them."""

    modules = watched = ()

    def __init__(self, truth: list[int], place: int | None, *, twice: bool = False) -> None:
        self.exit_layers, self.truth, self.place, self.twice = [1], truth, place, twice

    def on(self, layers: DecoderLayers) -> "Siblings":
        """Nothing to move."""
        return self

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> Any:
        """The same behind the right path and off it."""
        return [self._of(state.length + len(state.paths[node]), count) for node in nodes]

    def _of(self, position: int, count: int) -> list[tuple[int, float]]:
        right = self.truth[position] if position < len(self.truth) else 0
        tokens = [(right + 1 + index) % VOCABULARY for index in range(count)]
        if self.place is not None:
            tokens[min(self.place, count - 1)] = right
        if self.twice:
            tokens[0] = tokens[-1]
        return [(token, 0.9) for token in tokens]


def generate(model: Any, heads: Any, bounds: SpeculationBounds, **options: Any) -> tuple[list[int], SpeculationStats]:
    """Ids with speculation, seeded, and what it did."""
    attach(model, SpecBound(model, heads, bounds))
    try:
        torch.manual_seed(3)
        ids = model.generate(prompt(), max_new_tokens=NEW, **options)[0].tolist()
        assert model.specbound.certificate.bitwise
        return ids, model.specbound.stats
    finally:
        detach(model)


GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
# Depth and width of adversarial trees, and where among its siblings the right draft is.
TREES = [(1, 16, None), (1, 16, 15), (8, 2, None), (8, 2, 1), (3, 3, 2), (4, 2, 0)]


CASES = [(family, torch.float32) for family in sorted(FAMILIES)]
CASES += [("llama", torch.bfloat16), ("qwen3", torch.bfloat16)]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_adversarial_trees(family: str, dtype: torch.dtype) -> None:
    """All siblings wrong, the last one right, wide and deep; half of them greedy, half sampled, others in the next."""
    model, turn = tiny(family, dtype=dtype), CASES.index((family, dtype))
    for number, options in enumerate((GREEDY, SAMPLED)):
        torch.manual_seed(3)
        stock = model.generate(prompt(), max_new_tokens=NEW, **options)[0].tolist()
        for depth, width, place in TREES[(turn + number) % 2 :: 2]:
            bounds = SpeculationBounds(0.5, 1, 16, max_branches=width, max_depth=depth)
            ids, stats = generate(model, Siblings(stock, place), bounds, **options)
            assert ids == stock, (depth, width, place, options)
            assert stats.drafted.total() > NEW // 2
            if place is None:
                assert stats.accepted.total() == 0
            elif depth == 1:
                assert stats.mean_accepted_length > 1.9
            elif depth == 8 or place == 2:
                assert stats.mean_accepted_length > 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_proposed_twice_and_few_tokens_left(attention: str) -> None:
    """A drafter that names a token twice, and texts that end inside a tree, change nothing."""
    model = tiny("llama", attention=attention)
    stock = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)[0].tolist()
    bounds = SpeculationBounds(0.5, 1, 12, max_branches=3)
    assert generate(model, Siblings(stock, 2, twice=True), bounds, **GREEDY)[0] == stock
    attach(model, SpecBound(model, Siblings(stock, 1), bounds))
    for new in (1, 2, 3, 5):
        ids = model.generate(prompt(), max_new_tokens=new, do_sample=False)[0].tolist()
        assert ids == stock[: len(ids)] and model.specbound.stats.emitted == new


def test_a_tree_that_is_interrupted_leaves_stock_s_cache() -> None:
    """At any token: the rows that plain decoding would have left, with the values that it would have given them."""
    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)[0].tolist()
    bounds = SpeculationBounds(0.5, 1, 12, max_branches=3)
    for last in range(1, 9):
        caches = []
        for speculate in (False, True):
            cache, left = DynamicCache(config=model.config), iter(range(last))

            def stop(ids: torch.Tensor, scores: Any, left: Any = left) -> torch.Tensor:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return torch.zeros(1, dtype=torch.bool)

            if speculate:
                attach(model, SpecBound(model, Siblings(stock, 1), bounds))
            with pytest.raises(KeyboardInterrupt):
                model.generate(
                    prompt(), max_new_tokens=NEW, stopping_criteria=[stop], do_sample=False, **{CACHE: cache}
                )
            detach(model)
            caches.append([tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])
        assert all(torch.equal(mine, other) for mine, other in zip(*caches, strict=True))


def test_rejected_branches_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of every row that is not kept, poisoned with NaN, change nothing."""
    keep = KVCache.keep

    def poisoned(self: KVCache, settled: int, places: Sequence[int]) -> None:
        keep(self, settled, places)
        for buffer in (*self._keys, *self._values):
            buffer[:, :, settled + len(places) :] = float("nan")

    monkeypatch.setattr(KVCache, "keep", poisoned)
    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)[0].tolist()
    bounds = SpeculationBounds(0.5, 1, 14, max_branches=3)
    ids, stats = generate(model, Siblings(stock, 1), bounds, **GREEDY)
    assert ids == stock and stats.mean_accepted_length > 1.5


WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "another branch's rows are kept": lambda patch: patch.setattr(
        KVCache, "keep", lambda self, settled, places: self.crop(settled + len(places))
    ),
    "rows see the rows before them": lambda patch: patch.setattr(
        TreeRows, "keys", lambda self, row, device: torch.arange(self.settled + self.paths[row][-1] + 1)
    ),
    "positions count rows": lambda patch: patch.setattr(
        TreeRows, "positions", lambda self, first: list(range(first, first + len(self.paths)))
    ),
    "the first draft is taken": lambda patch: patch.setattr(
        runtime.decoding.rounds,
        "accept",
        lambda drafts, parents, choose: Accepted([drafts[0] if drafts else choose(0)[0]], [0], choose(0)[1]),
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_negative_controls(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these faults is seen by the comparison of ids."""
    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=NEW, do_sample=False)[0].tolist()
    WRONG[fault](monkeypatch)
    bounds = SpeculationBounds(0.5, 1, 12, max_branches=3)
    try:
        ids, _ = generate(model, Siblings(stock, 1), bounds, **GREEDY)
    except (AssertionError, RuntimeError, IndexError):
        return
    assert ids != stock


@pytest.mark.parametrize("kind", ["rowwise", "batched"])
def test_a_row_has_the_bits_of_its_path_alone(kind: str) -> None:
    """Logits, keys and values of every node of a tree: those of its path decoded token by token."""
    model = tiny("llama")
    layers, ids = DecoderLayers(model), prompt(9)[0].tolist()
    parents, tokens = [0, 0, 0, 1, 1, 2, 4, 3], [5, 9, 9, 7, 3, 11, 2, 8]
    policy = ExecutionPolicy.rowwise() if kind == "rowwise" else ExecutionPolicy.batched()

    def state() -> DecodeState:
        made = DecodeState(layers, KVCache(layers.num_layers, 32), ids[:-1])
        for token in ids[:-1]:
            made.push(token)
        made.verify()
        made.settle(list(range(len(ids) - 1)))
        made.push(ids[-1])
        return made

    with torch.no_grad(), execution(model, policy):
        tree = state()
        for token, parent in zip(tokens, parents, strict=True):
            tree.push(token, parent)
            tree.advance(len(tree.pending) % 3)  # nodes stand at different depths
        found = tree.verify()[0]
        for node in range(len(tree.pending)):
            alone = state()
            for token in tree.tokens(node)[1:]:
                alone.verify()
                alone.settle([0])
                alone.push(token)
            expected = alone.verify()[0, -1]
            if kind == "rowwise":
                assert torch.equal(found[node], expected)
            assert torch.allclose(found[node], expected, atol=1e-3)
            for layer in range(layers.num_layers):
                row = tree.cache.rows(layer, tree.length + node)[0][:, :, 0]
                assert torch.allclose(row, alone.cache.rows(layer, alone.length)[0][:, :, 0], atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("settled", [0, 1, 15, 47, 505, 1030])
def test_native_attention_of_a_tree(settled: int, order: str) -> None:
    """A row has the bits of its keys alone, in both orders, across vectors and blocks; no other keys are read."""
    if why_not_native() is not None:
        pytest.skip(f"no native kernels here: {why_not_native()}")
    paths = (
        (0,),
        (0, 1),
        (0, 2),
        (0, 1, 3),
        (0, 2, 4),
        (0, 2, 5),
        (0, 1, 3, 6),
        *((0, 1, 3, *range(6, n)) for n in range(8, 18)),
    )
    torch.manual_seed(0)
    length = settled + 17
    query = torch.randn(1, 6, len(paths), 64).bfloat16()
    keys, values = torch.randn(2, 1, 2, length + 3, 64).bfloat16()
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    tree = TreeRows(settled, paths)
    found = attend(query, keys[:, :, :length], values[:, :, :length], None, order, tree)
    assert found is not None
    for row in range(len(paths)):
        own = tree.keys(row, query.device)
        alone = attend(query[:, :, row : row + 1], keys[:, :, own], values[:, :, own], None, order)
        assert alone is not None and torch.equal(found[:, row], alone[:, 0])
