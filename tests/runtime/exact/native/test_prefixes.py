"""Prompts that begin alike: what is taken of another, what is not, and that every bit is that of the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime import SpeculationBounds, detach
from runtime.batch import Batch, generated
from runtime.batch.memory import KVMemory
from runtime.batch.reading import PromptReading
from runtime.exact.native.library import why_not_native
from runtime.exact.native.prefix import Prefixes
from runtime.exact.native.prompt_attention import PromptAttention
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import NATIVE_SHAPE, randomise
from tests.helpers.native.orders import torch_order

HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}


@pytest.fixture(autouse=True)
def kernels() -> None:
    """All of it needs them."""
    if why_not_native() is not None or torch_order() is None:
        pytest.skip(f"no native kernels here, or torch adds in an order of its own: {why_not_native()}")


def base(**own: Any) -> PreTrainedModel:
    """A random model of sizes that the kernel takes, for long texts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral" if "sliding_window" in own else "llama", **(NATIVE_SHAPE | own))
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    randomise(made)
    return made


def text(length: int, seed: int = 0) -> Tensor:
    """A random prompt; of one seed the shorter ones are beginnings of the longer ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (1, 2048), generator=generator)[:, :length]


def taken(model: PreTrainedModel, prompts: list[Tensor]) -> list[int]:
    """Tokens that each prompt was spared, one after the other; all ids compared with plain generate's."""
    expected = [model.generate(prompt, **HOW) for prompt in prompts]
    heads = FakeHeads("mixed", [1], expected[-1][0].tolist(), 96)
    attach(model, SpecBound(model, heads, SpeculationBounds(0.2, 1, 3)))
    reused = []
    try:
        with Batch(model, 1, KVMemory(20_000)) as batch:
            for prompt, stock in zip(prompts, expected, strict=True):
                mask = torch.ones_like(prompt)
                call = batch.add(prompt[0].tolist(), attention_mask=mask, **HOW)
                while not call.ended:
                    batch.round()
                assert generated(call) == stock[0, prompt.shape[1] :].tolist()
                reused.append(model.specbound.stats.reused)
    finally:
        detach(model)
    return reused


@pytest.fixture
def attends_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nowhere is its order known."""
    monkeypatch.setattr(PromptAttention, "knows", lambda self, length: False)


@pytest.mark.usefixtures("attends_by_torch")
def test_whole_blocks_are_taken_where_all_is_added_alike() -> None:
    """Of the prompt that has most in common; the very same prompt is taken whole. Blocks are of 256 queries here."""
    other_end = torch.cat([text(1100), text(60, seed=1)], 1)
    prompts = [
        text(1090),
        text(700, seed=2),
        text(1200),
        other_end,
        text(1200),
        torch.cat([text(500), text(700, 3)], 1),
    ]
    reused = taken(base(), prompts)
    assert reused[:2] == [0, 0] and reused[4] == 1200 and reused[5] in (0, 256)
    # Fewer where torch adds keys up by their number, 0 where it multiplies otherwise for so many rows.
    assert all(rows in range(0, 1025, 256) for rows in reused[2:4])
    assert torch.get_num_threads() > 2 or min(reused[2:4]) >= 512


@pytest.mark.usefixtures("attends_by_torch")
def test_a_short_beginning_is_taken_as_well() -> None:
    """As the system prompt of chats: in blocks of 32 queries, or of 64."""
    prompts = [text(90), torch.cat([text(70), text(60, seed=1)], 1), text(300), torch.cat([text(290), text(20, 2)], 1)]
    reused = taken(base(), prompts)
    assert reused[0] == reused[2] == 0
    assert reused[1] in (0, 32, 64) and reused[3] in (0, 64, 128, 192, 256)
    assert torch.get_num_threads() > 2 or (reused[1] == 64 and reused[3] > 0)


@torch.no_grad()
def test_what_is_common_is_so_in_torch_s_own_attention() -> None:
    """On numbers of texts, of many lengths and beginnings: no row that is said to be common differs."""
    heads, generator = (4, 2, 64), torch.Generator().manual_seed(3)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    prefixes = Prefixes(PromptAttention(heads, 0.125, attend), lambda rows: ())
    given = [torch.randn(1, count, 1500, 64, generator=generator).bfloat16() for count in (4, 2, 2)]
    common = 0
    for one, other in torch.randint(40, 900, (60, 2), generator=generator).tolist():
        rows = prefixes.common(one, other, min(one, other) - 1)
        outputs = []
        for length in (one, other):
            parts = [tensor[:, :, :length].contiguous() for tensor in given]
            outputs.append(prefixes.attention.stock(*parts)[:, :rows])
        assert torch.equal(*outputs)
        common += rows
    assert common > 0


def test_a_prompt_inside_another_is_read_for_its_last_token() -> None:
    """At least one token is read: its logits are asked for."""
    assert taken(base(), [text(1100), text(1024)])[1] in (0, 256, 512, 768, 1023)


def test_layers_with_windows_read_all_of_it() -> None:
    """Which keys they keep depends on the length."""
    assert taken(base(sliding_window=600), [text(1100), text(1200)]) == [0, 0]


@pytest.mark.parametrize("known", [False, True])
def test_what_does_not_keep_every_bit_is_not_taken(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Negative control: rows that differ are seen in the first prompt, whose ids are right, and not tried again."""
    if not known:
        monkeypatch.setattr(PromptAttention, "knows", lambda self, length: False)
    monkeypatch.setattr(Prefixes, "common", lambda self, one, other, alike: _common(self, one, other))
    part, tried = PromptReading._part, []

    def spoilt(self: PromptReading, end: int) -> Any:
        if end > 500:
            tried.append(self._done)
        outputs = part(self, end)
        self.cache.layers[0].keys[0, 0, 3].view(torch.int16).bitwise_xor_(0x40)  # type: ignore[union-attr, index]
        return outputs

    def _common(prefixes: Prefixes, one: int, other: int) -> int:
        return 512 if prefixes.proven.get(prefixes.kind(one, other), True) else 0

    monkeypatch.setattr(PromptReading, "_part", spoilt)
    assert taken(base(), [text(1100), text(1200), text(1210)]) == [0, 0, 0]
    assert tried == [512]


def test_a_long_prompt_is_read_between_rounds_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, as many tokens at once as are allowed, with the ids of each alone; whole where a part cannot be."""
    model, prompts = base(), [text(40), text(700, 2), text(330, 3)]
    how: list[dict[str, Any]] = [HOW | {"max_new_tokens": 24}, HOW, HOW]
    expected = [model.generate(one, **own)[0, one.shape[1] :].tolist() for one, own in zip(prompts, how, strict=True)]
    parts, part, attend, broken = [], PromptReading._part, PromptAttention.__call__, False

    def noted(self: PromptReading, end: int) -> Any:
        parts.append((self._done, end))
        return part(self, end)

    def attended(self: PromptAttention, query: Tensor, keys: Tensor, values: Tensor, whole: int | None = None) -> Any:
        return None if broken and whole == 700 and keys.shape[2] > 400 else attend(self, query, keys, values, whole)

    monkeypatch.setattr(PromptReading, "_part", noted)
    monkeypatch.setattr(PromptAttention, "__call__", attended)
    attach(model, SpecBound(model, FakeHeads("mixed", [1], expected[0], 96), SpeculationBounds(0.2, 1, 3)))
    try:
        for broken in (False, True):
            parts.clear()
            with Batch(model, 3, KVMemory(20_000)) as batch:
                calls = [batch.add(one[0].tolist(), **own) for one, own in zip(prompts, how, strict=True)]
                while not all(call.ended for call in calls):
                    batch.round()
            assert [generated(call) for call in calls] == expected
            if model.specbound.prepared.prompts.in_parts(700):
                whole = [] if broken else [(472, 700), (0, 256), (256, 330)]
                assert parts[-5:] == [(0, 216), (216, 472), *whole] or (broken and (472, 700) not in parts)
    finally:
        detach(model)


@torch.no_grad()
@pytest.mark.usefixtures("attends_by_torch")
def test_attention_that_adds_otherwise_shows() -> None:
    """A kernel that adds otherwise from some length on: nothing is common there, nor where orders of products are not
    known, or are others."""

    def attend(_: Any, query: Tensor, keys: Tensor, values: Tensor, *__: Any, **given: Any) -> tuple[Tensor, None]:
        scale = given["scaling"]
        if query.shape[2] < 1100:
            stock = torch.nn.functional.scaled_dot_product_attention
            return stock(query, keys, values, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2), None
        scores = query @ keys.repeat_interleave(2, 1).transpose(-1, -2) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ values.repeat_interleave(2, 1)).transpose(1, 2), None

    attention = PromptAttention((4, 2, 64), 0.125, attend)
    prefixes = Prefixes(attention, lambda rows: ())
    assert prefixes.common(1050, 1090, 1050) in range(512, 1025, 256)
    assert prefixes.common(1050, 1150, 1050) == 0
    assert prefixes.common(1050, 1090, 250) == prefixes.common(700, 1090, 700) == 0
    assert Prefixes(attention, lambda rows: None).common(1050, 1090, 1050) == 0
    by_rows: Any = Prefixes(attention, lambda rows: (rows > 1060,))
    assert by_rows.common(1070, 1090, 1050) >= 512
    assert by_rows.common(1050, 1090, 1050) == 0
