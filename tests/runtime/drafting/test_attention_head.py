"""The attention head: step by step with kept keys, as a round drafts, against whole texts as a fit sees them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.attention_head import AttentionHead
from runtime.drafting.exit_head import NONE, OWN, VERIFIED, HeadContext, WholeTexts
from runtime.drafting.unembedding import DraftUnembedding

WIDTH, VERIFIED_ROWS, DRAFTS = 192, 7, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def rows(make_model: Any) -> DraftUnembedding:
    """The rows of a base of width 192."""
    return DraftUnembedding(DecoderLayers(make_model(hidden_size=WIDTH)), torch.arange(3, 80))


@pytest.fixture(scope="module")
def head() -> AttentionHead:
    """Large random weights, so that whatever is read shows."""
    torch.manual_seed(0)
    made = AttentionHead(WIDTH, 77, rank=24)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.1)
    return made.requires_grad_(False)


def text(length: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, embeddings and top states of a text, the last moved to the position after."""
    generator = torch.Generator().manual_seed(seed)
    hidden, embedding, deep = torch.randn(3, length, WIDTH, generator=generator)
    deep[0] = 0
    return hidden, embedding, deep


class Worked:
    """A head on the text: states and keys of the first positions, with verified states, at once."""

    def __init__(self, head: AttentionHead, rows: DraftUnembedding, count: int) -> None:
        self.head, self.rows, self.count, self.held = head, rows, count, 0
        shape = head.num_key_heads, count + 8, head.head_size
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        parts = tuple(each[:count] for each in text(VERIFIED_ROWS + DRAFTS))
        source, paths = [NONE] + [VERIFIED] * (count - 1), [range(place + 1) for place in range(count)]
        self.states = self.step(parts, source, list(range(count)), 0, paths)

    def step(self, parts: Any, source: list[int], positions: list[int], settled: int, paths: Any) -> Tensor:
        """Further rows, behind those that are held."""
        buffers = self.keys, self.values
        state = self.head.step(parts, source, positions, *buffers, self.held, settled, paths, self.rows)
        self.held += len(source)
        return state


def whole(number: int = VERIFIED_ROWS + DRAFTS, *, start: int = 2, padding: int = 0) -> tuple[Tensor, WholeTexts]:
    """The text as a fit has it: its hidden states, and the rest."""
    padded = [torch.cat([each[:number], torch.full((padding, WIDTH), 50.0)])[None] for each in text(number)]
    chosen = (torch.arange(number - start + padding) < number - start)[None]
    return padded[0], WholeTexts({2: padded[0]}, padded[1], padded[2], torch.tensor([start]), chosen)


def test_sizes_follow_the_hidden_size() -> None:
    sizes = {32: (1, 1, 32), 576: (9, 3, 64), 896: (14, 2, 64), 4096: (64, 16, 64)}
    for width, expected in sizes.items():
        made = AttentionHead(width, 8, rank=4)
        assert (made.num_heads, made.num_key_heads, made.head_size) == expected
    assert AttentionHead(576, 8192, rank=896).num_weights < 3_540_096  # of a decoder layer of SmolLM2-135M


def test_drafting_with_kept_keys_is_what_a_fit_unrolls(head: AttentionHead, rows: DraftUnembedding) -> None:
    """A chain of drafts after each number of verified positions, row by row, gives the states of each step."""
    hidden, texts = whole()
    steps = [
        head(hidden, HeadContext(texts.embedding, texts.deep, torch.full((9,), age), texts), rows)
        for age in range(1, DRAFTS + 1)
    ]
    hidden, embedding, _ = text(VERIFIED_ROWS + DRAFTS)
    for known in range(3, VERIFIED_ROWS + 1):
        worked = Worked(head, rows, known)
        state = worked.states[-1:]
        torch.testing.assert_close(rows.of_normed(state[0]), steps[0][known - 3], **CLOSE)
        for draft in range(1, DRAFTS):
            at = known - 1 + draft
            one = slice(at, at + 1)
            parts = hidden[one], embedding[one], state
            state = worked.step(parts, [OWN], [at], known, [range(draft)])
            if draft < at - 1:  # so many drafts fit into the response
                torch.testing.assert_close(rows.of_normed(state[0]), steps[draft][at - 2], **CLOSE)


def test_rows_of_a_tree_see_their_ancestors_alone(head: AttentionHead, rows: DraftUnembedding) -> None:
    """Two branches at once give what each gives alone, whatever the other holds, poison included."""
    hidden, embedding, _ = text(6, seed=5)

    def second(of: Tensor, paths: list[list[int]]) -> Tensor:
        worked, number = Worked(head, rows, VERIFIED_ROWS), len(of)
        parts = of, embedding[:number], worked.states[-1:].expand(number, -1)
        return worked.step(parts, [OWN] * number, [VERIFIED_ROWS] * number, VERIFIED_ROWS, paths)

    both = second(hidden[:2], [[0], [1]])
    alone = second(hidden[:1], [[0]])
    other = second(torch.stack([hidden[0], hidden[3] * 1e6]), [[0], [1]])
    torch.testing.assert_close(both[:1], alone, **CLOSE)
    torch.testing.assert_close(other[:1], alone, **CLOSE)
    chained = second(hidden[:2], [[0], [0, 1]])
    assert not torch.allclose(chained[1], both[1], **CLOSE)  # an ancestor more is seen


def test_what_is_read_shows_and_what_comes_later_does_not(head: AttentionHead, rows: DraftUnembedding) -> None:
    hidden, texts = whole()
    context = HeadContext(texts.embedding, texts.deep, torch.ones(9, dtype=torch.int64), texts)
    before = head(hidden, context, rows)
    for name in ("hidden", "embedding", "deep"):
        changed = {"hidden": hidden, "embedding": texts.embedding, "deep": texts.deep}
        changed[name] = changed[name].clone()
        changed[name][0, 5] += 1
        other = WholeTexts({}, changed["embedding"], changed["deep"], texts.start, texts.chosen)
        after = head(changed["hidden"], HeadContext(context.embedding, context.deep, context.age, other), rows)
        same = [torch.allclose(one, two, **CLOSE) for one, two in zip(before, after, strict=True)]
        assert same == [True] * 3 + [False] * 6, name


def test_padding_changes_nothing(head: AttentionHead, rows: DraftUnembedding) -> None:
    ages = torch.tensor([[1] * 9, [3] * 9, [0] * 9])
    found = []
    for padding in (0, 5):
        hidden, texts = whole(padding=padding)
        found.append(head(hidden, HeadContext(texts.embedding, texts.deep, ages, texts), rows))
    assert found[0].shape == (3, 9, 77)
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    # At the first response position there is but a first draft, and but two at the next.
    torch.testing.assert_close(found[0][0, 0], found[0][1, 0])
    torch.testing.assert_close(found[0][1, :3], found[0][2, :3])
    assert not torch.allclose(found[0][1, 3], found[0][2, 3], **CLOSE)


def test_each_draft_learns_through_those_before(rows: DraftUnembedding) -> None:
    made = AttentionHead(WIDTH, 77, rank=24)
    torch.nn.init.normal_(made.attention_out.weight, std=0.1)
    hidden, texts = whole()
    hidden = hidden.clone().requires_grad_()
    context = HeadContext(texts.embedding, texts.deep, torch.full((9,), 3), texts)
    made(hidden, context, rows)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert hidden.grad is not None and bool((hidden.grad[0].abs().sum(-1) > 0).all())


@torch.no_grad()
def test_a_fit_starts_with_the_state_of_the_position_before(make_model: Any) -> None:
    """However differently the base's norm scales numbers, and where it scales one by 0."""
    base = DecoderLayers(make_model(hidden_size=WIDTH))
    weight: Any = base.norm.weight
    weight.copy_(torch.linspace(0.5, 40, WIDTH)).index_fill_(0, torch.tensor([5]), 0.0)
    rows = DraftUnembedding(base, None)
    assert torch.allclose(rows.norm_scale, weight, rtol=1e-3)
    torch.manual_seed(2)
    head, usual = AttentionHead(WIDTH, 77, rank=24), AttentionHead(WIDTH, 77, rank=24)
    head.start(rows)
    hidden, embedding, before = torch.randn(3, 40, WIDTH)
    deep = rows.normalize(before)
    context = HeadContext(embedding, deep, torch.ones(40, dtype=torch.long))
    close = [torch.cosine_similarity(each(hidden, context, rows), rows.of_normed(deep)) for each in (head, usual)]
    assert close[0].min() > 0.9 and close[1].abs().mean() < 0.5


@torch.no_grad()
def test_what_a_norm_scales_by_is_told_of_every_kind() -> None:
    """Of one that subtracts the mean, and of Gemma's."""
    layer, gemma = torch.nn.LayerNorm(WIDTH), Gemma3RMSNorm(WIDTH)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(gemma.weight)
    for norm, expected in ((layer, layer.weight), (gemma, 1 + gemma.weight)):
        base: Any = SimpleNamespace(norm=norm, unembedding=torch.nn.Linear(WIDTH, 9), logits_scaling=1.0)
        assert torch.allclose(DraftUnembedding(base, None).norm_scale, expected, rtol=1e-3, atol=1e-4)
