"""Layers in calls of fixed shapes over a static cache: the sums of the ordinary path, as plain twin and recorded.

No GPU is needed: `fake_cuda` records on the CPU.
"""

import pytest
import torch

from runtime.decoding.cache import KVCache
from runtime.decoding.families import CACHE
from runtime.exact.static import StaticCache
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import FAMILIES, LAYERS, prompt, tiny
from tests.helpers.graphs.segments import GREEDY, STATIC, attached, in_blocks, prefilled, same_ids

pytestmark = pytest.mark.usefixtures("own_certificates")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_segments_compute_what_the_layers_do(family: str, attention: str, way: str) -> None:
    """Hidden states, keys and values, at widths that are padded and that are not."""
    model = tiny(family, attention=attention)
    ids, widths = prompt(30), [3, 1, 5, 2, 1, 8]
    stock = prefilled(model, ids[:, :7])
    static, ordinary = StaticCache.from_dynamic(stock, 40), KVCache.from_dynamic(stock, 40)
    for mine, theirs in zip(*(in_blocks(model, cache, ids, 7, widths) for cache in (static, ordinary)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert static.lengths == ordinary.lengths == [27] * LAYERS
    for layer in range(LAYERS):
        for mine, theirs in zip(static.rows(layer, 0), ordinary.rows(layer, 0), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len(static.graphs) == (8 if way == "recorded" else 0)  # two segments, of 1, 2, 4 and 8 rows


@pytest.mark.parametrize(
    ("way", "family"),
    [("twin", family) for family in sorted(FAMILIES)] + [("recorded", family) for family in ("llama", "gpt2")],
    indirect=["way"],
)
def test_greedy_and_sampled(way: str, family: str) -> None:
    """Ids are stock's in float32, where near-ties are rare, one request after another over the same buffers."""
    model = tiny(family)
    specbound, stores = attached(model, prompt()), []
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}):
        assert same_ids(model, prompt(), max_new_tokens=40, **options)
        assert specbound.certificate is not None and specbound.certificate.policy == STATIC
        assert specbound.stats.accepted.total() > 3
        assert specbound.prepared.static is not None
        stores.append(specbound.prepared.static._store)
    assert stores[0] is stores[1]


@pytest.mark.parametrize("length", [1, 2, 250, 256])
def test_prompts_of_one_token_and_around_the_first_size(length: int, way: str) -> None:
    """Also wider than 16 tokens in a round, and the cache that is handed back is stock's."""
    model = tiny("llama")
    ids = prompt(length)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    stock = model.generate(ids, **options)
    specbound = attached(model, stock.sequences, width=20)
    specbound.drafter = FakeHeads("right", [2], stock.sequences[0].tolist())
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, stock.sequences)
    assert specbound.stats.mean_accepted_length > 17
    for mine, theirs in zip(found[CACHE].layers, stock[CACHE].layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=1e-3)


def test_a_longer_text_makes_it_grow(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a text, keeping its rows and nothing recorded; a shorter one afterwards fits."""
    monkeypatch.setattr("runtime.exact.static.MIN_POSITIONS", 8)
    monkeypatch.setattr("runtime.exact.static.ROOM", 1)
    model = tiny("qwen2")
    ids = prompt(60)
    stock = prefilled(model, ids[:, :5])
    static, sizes = StaticCache.from_dynamic(stock, 6), []
    mine = []
    for first, width in ((5, 2), (7, 4), (11, 1), (12, 8), (20, 13), (33, 2)):
        before = static.graphs
        mine += in_blocks(model, static, ids, first, [width])
        assert (static.graphs is before) == (sizes[-1:] == [static._columns.numel()] or first == 5)
        sizes.append(static._columns.numel())
    assert sizes == [8, 16, 16, 32, 64, 64]
    theirs = in_blocks(model, KVCache.from_dynamic(stock, 60), ids, 5, [2, 4, 1, 8, 13, 2])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    static.fill(stock, 6)
    assert static._columns.numel() == 64 and static.lengths == [5] * LAYERS
    torch.testing.assert_close(in_blocks(model, static, ids, 5, [2])[0], mine[0], rtol=1e-4, atol=1e-4)


def test_buffers_stay_where_they_are() -> None:
    """Whatever the position and width: nothing that a graph reads or writes is allocated again."""
    model = tiny("llama")
    static = StaticCache.from_dynamic(prefilled(model, prompt(7)), 40)
    in_blocks(model, static, prompt(60), 7, [1, 2, 3, 7])

    def where() -> list[int]:
        return [
            tensor.data_ptr()
            for tensor in (*static._keys, *static._values, *static._inputs.values(), static._start, static._columns)
            if tensor is not None
        ]

    before = where()
    static.crop(9)
    in_blocks(model, static, prompt(60), 9, [7, 1, 4, 2, 8, 1])
    assert where() == before


def test_cropped_rows_are_never_read(way: str) -> None:
    """Blocks on other tokens, cropped, then the right ones: as if they had never been, though they were not finite."""
    model = tiny("llama")
    ids = prompt(20)
    wrong = (ids + 1) % 90
    stock = prefilled(model, ids[:, :7])
    static = StaticCache.from_dynamic(stock, 40)
    for width, padded in ((2, 2), (5, 8), (9, 16)):
        in_blocks(model, static, wrong, 7, [width])
        for buffer in (*static._keys, *static._values):
            assert buffer is not None
            buffer[:, :, 7 : 7 + padded] = torch.nan
        for given in static._inputs.values():
            given.fill_(torch.nan)
        static.crop(7)
    mine = in_blocks(model, static, ids, 7, [5, 1, 3])
    for one, other in zip(mine, in_blocks(model, KVCache.from_dynamic(stock, 40), ids, 7, [5, 1, 3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_positions_that_are_not_the_rows_of_the_cache(way: str) -> None:
    """A caller may number them another way."""
    model = tiny("llama")
    options = {"inputs": prompt(), "position_ids": torch.arange(4, 11)[None], "max_new_tokens": 30, "do_sample": False}
    stock = model.generate(**options)
    attached(model, stock)
    assert torch.equal(model.generate(**options), stock)


def test_inference_mode(way: str) -> None:
    """Buffers made in it can be written outside of it."""
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    attached(model, stock)
    with torch.inference_mode():
        assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
