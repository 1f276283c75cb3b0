"""Heads in our own kernel: the drafts and confidences of the modules, up to rounding."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.exit_head import SettledStates
from runtime.drafting.head_memory import HeadMemory, read_all
from runtime.drafting.heads import MAX_AGE, ExitHeads, HeadContext
from runtime.exact.native.heads import native_heads
from runtime.exact.native.library import why_not_native
from runtime.exact.native.products import QuantizedWeight
from tests.helpers.families import tiny

SIZE, VOCABULARY = 48, 37


def made(
    kind: str = "deep", *, dtype: torch.dtype = torch.bfloat16, rank: int = 32, family: str = "llama"
) -> DraftHeads:
    """Random heads on a tiny base, in our kernel where it takes them."""
    if why_not_native() is not None:
        pytest.skip(f"no native kernels here: {why_not_native()}")
    base = tiny(family, dtype=dtype)
    exits = ExitHeads(kind, [1, 2], hidden_size=SIZE, draft_vocab_size=VOCABULARY, rank=rank)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    heads = DraftHeads.of(exits.to(dtype).eval(), DecoderLayers(base), torch.arange(3, 3 + VOCABULARY))
    return native_heads(heads)


def read(memory: HeadMemory, nodes: list[int], *given: Any) -> None:
    """Read pending tokens of one request."""
    memory.take(nodes, *read_all([memory], [memory.reading(nodes, *given)]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_drafts_are_those_of_the_modules(family: str) -> None:
    """At every age; a confidence is off by no more than rounding, and another temperature gives another one."""
    heads = made(family=family)
    assert set(heads.native) == {1, 2}
    modules = replace(heads, native={})
    same = 0
    for number in range(100):
        state, embedding, deep = torch.randn(3, 1, SIZE).bfloat16()
        context = HeadContext(embedding, deep, torch.tensor([number % (MAX_AGE + 1)]))
        layer, temperature = 1 + number % 2, 1.0 + number / 100
        token, chance = heads.best(layer, state, context, temperature, 1)[0][0]
        expected, sure = modules.best(layer, state, context, temperature, 1)[0][0]
        same += token == expected
        assert chance == pytest.approx(sure, rel=0.1) and 3 <= token < 3 + VOCABULARY
        assert heads.best(layer, state, context, 9.0, 1)[0][0][1] < chance
    assert same > 90


@torch.inference_mode()
def test_weights_are_those_of_the_modules_quantized() -> None:
    """Modules whose rows are rounded like that are far nearer to the kernel than with their own."""
    weight = torch.randn(37, 48).bfloat16()
    weight[5] = 0
    kept = QuantizedWeight.of(weight)
    found = (kept.numbers.transpose(1, 2).reshape(48, 48).float() - 64) * kept.scales[:, None]
    assert bool(((found[:37] - weight.float()).abs() <= 0.51 * kept.scales[:37, None]).all())
    assert not found[[5, *range(37, 48)]].any()

    heads = made("attention")
    states, weight = torch.randn(64, SIZE).bfloat16(), heads.unembedding.weight.detach()
    kept = QuantizedWeight.of(weight)
    rounded = ((kept.numbers.transpose(1, 2).reshape(-1, SIZE).float() - 64) * kept.scales[:, None])[:VOCABULARY]
    ids, chances = heads.native[1].likeliest(states, 1.0, 3)

    def off(rows: torch.Tensor) -> float:
        expected = torch.softmax(states.float() @ rows.T, -1).gather(1, ids)
        return float((chances / expected).log().abs().mean())

    assert off(rounded) < 0.5 * off(weight.float())


@torch.inference_mode()
def test_several_rows_are_each_what_they_are_alone() -> None:
    """And of each the likeliest drafts, in order, none twice."""
    heads = made()
    states, embeddings, deeps = torch.randn(3, 11, SIZE).bfloat16()
    ages = torch.arange(11) % (MAX_AGE + 1)
    together = heads.best(1, states, HeadContext(embeddings, deeps, ages), 1.2, 4)
    for row, drafts in enumerate(together):
        part = slice(row, row + 1)
        alone = heads.best(1, states[part], HeadContext(embeddings[part], deeps[part], ages[part]), 1.2, 4)
        assert drafts == alone[0] and len({token for token, _ in drafts}) == 4
        assert [chance for _, chance in drafts] == sorted((chance for _, chance in drafts), reverse=True)
        assert sum(chance for _, chance in drafts) <= 1.001


@torch.inference_mode()
def test_logits_that_are_no_numbers_draft_nothing() -> None:
    """Their confidence passes no threshold."""
    state = torch.full((1, SIZE), torch.nan).bfloat16()
    [[(_, chance), _]] = made().best(1, state, HeadContext(state, state, torch.tensor([1])), 1.0, 2)
    assert not chance >= 0.0


@pytest.mark.parametrize("kind", ["deep", "attention"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))], ids=["copy", "pickle"]
)
@torch.inference_mode()
def test_copies_draft_from_weights_of_their_own(copied: Any, kind: str) -> None:
    """What is written in the original does not move a copy; other heads in their place do not run in the kernel."""
    heads = made(kind)

    def drafts(heads: DraftHeads) -> Any:
        torch.manual_seed(0)
        if kind == "attention":
            return at_work(heads, 1)[-1].tolist()
        state, embedding, deep = torch.randn(3, 1, SIZE).bfloat16()
        return heads.best(1, state, HeadContext(embedding, deep, torch.tensor([1])), 1.0, 2)

    expected, other = drafts(heads), copied(heads)
    for packed in heads.native[1].held:
        packed.zero_()
    assert drafts(other) == expected != drafts(heads)
    assert other.with_exits(heads.exits).native == {}


# Of each round: settled positions before it, and the pending tokens, each by the place of the one that it follows.
ROUNDS = [(9, [None, 0, 1]), (1, [None]), (3, [None, 0, 0, 0, 1, 3, 5]), (2, [None, 0, 1, 2, 3, 4]), (40, [None, 0])]


def at_work(heads: DraftHeads, layer: int, *, skip: int | None = None) -> list[torch.Tensor]:
    """States of all pending tokens of those rounds, on the same random numbers for all heads.

    Args:
        skip: a round whose tokens before the last are taken for others.
    """
    torch.manual_seed(3)
    memory = HeadMemory(heads.exits.heads[str(layer)], heads.unembedding, heads.native.get(layer))
    found = []
    for index, (new, parents) in enumerate(ROUNDS):
        hidden, embedding, deep = torch.randn(3, new, SIZE).bfloat16()
        memory.forget()
        memory.settle([SettledStates(hidden, embedding, deep, known=index > 0)])
        paths: list[tuple[int, ...]] = []
        for place, parent in enumerate(parents):
            paths.append((*(paths[parent] if parent is not None else ()), place))
        pending = torch.randn(2, len(paths), SIZE).bfloat16()
        if index == skip:
            pending[:, -2] += 1
        top = torch.randn(SIZE).bfloat16() if index else None
        for depth in range(1, 1 + max(map(len, paths))):
            level = [node for node, path in enumerate(paths) if len(path) == depth]
            read(memory, level, paths, (pending[0, level], pending[1, level]), top)
        found.append(memory.states(range(len(paths))))
    return found


@pytest.mark.parametrize("window", [512, 8])
@torch.inference_mode()
def test_states_of_heads_that_attend_are_those_of_the_modules(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In trees, behind settled positions, and where some of these are dropped; and their likeliest tokens."""
    monkeypatch.setattr("runtime.drafting.head_memory.WINDOW", window)
    heads = made("attention")
    modules = replace(heads, native={})
    assert set(heads.native) == {1, 2}
    same = total = 0
    for own, expected in zip(at_work(heads, 2), at_work(modules, 2), strict=True):
        close = torch.nn.functional.cosine_similarity(own.float(), expected.float(), dim=-1)
        assert close.min() > 0.995
        drafts = (each.of_states(2, expected, 1.1, 3) for each in (heads, modules))
        for few, more in zip(*drafts, strict=True):
            same += few[0][0] == more[0][0]
            total += 1
            assert few[0][1] == pytest.approx(more[0][1], rel=0.1)
    assert same > 0.8 * total


@torch.inference_mode()
def test_every_row_counts() -> None:
    """Another parent of the last token gives it another state; its siblings keep theirs."""
    heads = made("attention")
    own, other = at_work(heads, 1), at_work(heads, 1, skip=2)
    assert torch.equal(own[2][:5], other[2][:5])
    assert not torch.equal(own[2][5:], other[2][5:])


@torch.inference_mode()
def test_states_that_are_no_numbers_draft_nothing() -> None:
    """Nor do they stop anything."""
    heads = made("attention")
    memory = HeadMemory(heads.exits.heads["1"], heads.unembedding, heads.native[1])
    nan = torch.full((1, SIZE), torch.nan).bfloat16()
    read(memory, [0], [(0,)], (nan, nan), None)
    assert not heads.of_states(1, memory.states([0]), 1.0, 1)[0][0][1] >= 0.0


WRONG: list[dict[str, Any]] = [{"kind": "lora"}, {"dtype": torch.float32}, {"rank": 20}, {"family": "gpt2"}]
WRONG += [{"kind": "attention"} | options for options in WRONG[1:]]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_other_heads_stay_modules(options: dict[str, Any]) -> None:
    """Another kind, dtype or rank, or a final norm that subtracts the mean."""
    assert made(**options).native == {}


@torch.inference_mode()
def test_several_requests_are_each_what_they_are_alone() -> None:
    """Read together: texts of other lengths, other numbers of pending tokens."""
    heads = made("attention")
    torch.manual_seed(5)
    texts = [torch.randn(3, length, SIZE).bfloat16() for length in (1, 40, 7)]
    pending = [torch.randn(2, number, SIZE).bfloat16() for number in (3, 1, 2)]

    def begun(index: int) -> tuple[HeadMemory, Any]:
        memory = heads.memory(1, {})
        memory.settle([SettledStates(*texts[index], False)])
        nodes = list(range(pending[index].shape[1]))
        paths = [(node,) for node in nodes]
        return memory, memory.reading(nodes, paths, (pending[index][0], pending[index][1]), texts[index][2, -1])

    alone = [read_all([memory], [reading])[0] for memory, reading in map(begun, range(3))]
    memories, readings = zip(*map(begun, range(3)), strict=True)
    together = read_all(memories, readings)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    for memory, reading, (own, before) in zip(memories, readings, map(begun, range(3)), strict=True):
        read_all([own], [before])
        rows = reading.held + len(reading.source)
        assert torch.equal(memory._keys[:, :rows], own._keys[:, :rows])
