"""Prompts in our own kernel: orders of many rows, what is refused, and what is left as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from runtime import SpeculationBounds, detach
from runtime.decoding.drafter import NoDrafter
from runtime.decoding.families import CACHE, text_decoder
from runtime.decoding.layers import DecoderLayers
from runtime.exact.execution import prompt_layers
from runtime.exact.native import prompt as native
from runtime.exact.native.library import has_tiles, why_not_native
from runtime.exact.native.products import Order, pack_for_products, products
from runtime.exact.native.prompt import PromptLayers, is_steady
from runtime.exact.native.prompt_orders import PromptOrders, Telling
from runtime.exact.native.tables import RotaryTables, table_of
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import probe
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.families import NATIVE_SHAPE, prompt, randomise
from tests.helpers.native.orders import torch_order


@pytest.fixture(autouse=True)
def kernels() -> None:
    """All of it needs them."""
    if why_not_native() is not None or torch_order() is None:
        pytest.skip(f"no native kernels here, or torch adds in an order of its own: {why_not_native()}")


@pytest.fixture
def model() -> PreTrainedModel:
    """A random one of sizes that the kernel takes."""
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **NATIVE_SHAPE), dtype=torch.bfloat16
    ).eval()
    randomise(made)
    return made


def layers_of(model: PreTrainedModel) -> PromptLayers:
    """As the probe finds them."""
    packed = PackedLinears.of(model)
    certificate = probe(model, max_width=3, packed=packed)
    assert certificate.policy.prompts and "prompts native" in str(certificate)
    run = prompt_layers(model, certificate.policy, packed)
    assert run is not None
    return run


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(576, 192), (1536, 576)], ids=str)
def test_an_order_that_is_found_gives_every_bit(sizes: tuple[int, int], threads: int) -> None:
    """On ordinary numbers and rows that differ, at numbers of rows between which torch changes its order."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear = nn.Linear(*sizes, bias=False).to(torch.bfloat16)
        telling, found = Telling.of(linear), []
        for rows in (2, 35, 40, 190, 300):
            order = telling.order(rows, has_tiles(), [])
            if order is not None:
                hidden = torch.randn(1, rows, sizes[0]).exp().to(torch.bfloat16)
                ours = products(hidden, pack_for_products(linear.weight), None, sizes[1], order)
                assert torch.equal(ours, functional.linear(hidden, linear.weight))
                found.append(order)
        assert found and (not has_tiles() or len(found) == 5)
        assert not has_tiles() or threads == 1 or sizes[0] == 576 or any(order.group for order in found)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_an_order_that_nobody_knows_is_none() -> None:
    """Of a Linear that adds its inputs in halves, and rounds between; then the model's own layers read the prompt."""

    class Halved(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            first, second = (part.contiguous() for part in hidden.chunk(2, -1))
            ours, others = (part.contiguous() for part in self.weight.chunk(2, -1))
            return functional.linear(first, ours) + functional.linear(second, others)

    linear = Halved(576, 192, bias=False).to(torch.bfloat16)
    assert Telling.of(linear).order(40, has_tiles(), []) is None
    assert PromptOrders([linear], has_tiles())(40) is None


@torch.no_grad()
def test_another_order_shows() -> None:
    """Negative control: on the numbers that tell, each other length of blocks has other bits."""
    telling, rows = Telling.of(nn.Linear(576, 192, bias=False).to(torch.bfloat16)), torch.ones(1, 40, 576).bfloat16()
    order = telling.order(40, has_tiles(), [])
    assert order is not None
    for block in range(32, 577, 32):
        other = Order(has_tiles(), block)
        ours = products(rows, telling.packed, None, 192, other)
        assert torch.equal(ours, telling.linear(rows)) == (other == order)


def test_where_no_order_is_known_the_certificate_says_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts stay with the model's own layers."""
    monkeypatch.setattr(native.PromptOrders, "__call__", lambda self, rows: None)
    certificate = probe(model, max_width=3, packed=PackedLinears.of(model))
    assert certificate.policy.native and not certificate.policy.prompts
    assert "prompts native" not in str(certificate)


@torch.no_grad()
@pytest.mark.parametrize("part", ["_before", "_after"])
def test_spoilt_layers_are_refused(part: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the probe sees one bit of the first layer, and prompts stay with the model's own layers."""
    whole = getattr(PromptLayers, part)

    def spoilt(self: PromptLayers, index: int, *given: Any) -> Any:
        found = whole(self, index, *given)
        first = found[0] if part == "_before" else found
        place = (0, *[-1] * (first.dim() - 2), slice(-1, None))
        first.view(torch.int16)[place] ^= 0 if index else 0x40
        return found

    monkeypatch.setattr(PromptLayers, part, spoilt)
    certificate = probe(model, max_width=3, packed=PackedLinears.of(model))
    assert certificate.bitwise and certificate.policy.native and not certificate.policy.prompts


@torch.no_grad()
def test_ids_are_those_of_plain_generate(model: PreTrainedModel) -> None:
    """Of prompts of many lengths, read at once and in chunks; the layers did run natively."""
    runs: list[int] = []
    after = PromptLayers._after

    def counted(self: PromptLayers, index: int, orders: Any, attended: Tensor, hidden: Tensor) -> Tensor:
        runs.append(hidden.shape[1])
        return after(self, index, orders, attended, hidden)

    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    lengths = {length: {} for length in (1, 2, 30, 47)} | {61: {"prefill_chunk_size": 25}}
    expected = {length: model.generate(prompt(length), **how, **own) for length, own in lengths.items()}
    attach(model, SpecBound(model, NoDrafter(), SpeculationBounds(2.0, 0, 2)))
    PromptLayers._after = counted  # type: ignore[method-assign]
    try:
        for length, own in lengths.items():
            assert torch.equal(model.generate(prompt(length), **how, **own), expected[length])
    finally:
        PromptLayers._after = after  # type: ignore[method-assign]
        detach(model)
    depth = len(text_decoder(model).layers)
    assert [runs.count(rows) // depth for rows in (2, 30, 47, 25)] == [1, 1, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("control", [False, True])
def test_what_is_written_through_data_between_calls_counts(
    control: bool, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies, norms and matrices; where angles were kept from call to call, ids would be others."""
    twin = copy.deepcopy(model)
    attach(model, SpecBound(model, NoDrafter(), SpeculationBounds(2.0, 0, 2)))
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    same = [torch.equal(model.generate(prompt(30), **how), twin.generate(prompt(30), **how))]
    if control:
        monkeypatch.setattr(RotaryTables, "forget", lambda self: None)
    for name, factor in (("rotary_emb.inv_freq", 0.1), ("layers.0.input_layernorm.weight", 1.5), ("norm.weight", -1)):
        for one in (model, twin):
            dict([*one.model.named_parameters(), *one.model.named_buffers()])[name].data.mul_(factor)
        same.append(torch.equal(model.generate(prompt(30), **how), twin.generate(prompt(30), **how)))
    detach(model)
    assert same[0] and all(same) != control


@torch.no_grad()
def test_heads_are_given_what_they_would_be_given(model: PreTrainedModel) -> None:
    """Hidden states at an exit, embeddings and top states; the layers are left as they were, also after an error."""
    run, layers = layers_of(model), DecoderLayers(model)
    seen = []
    for native_too in (False, True):
        with layers.watching([1]) as states:
            if native_too:
                with run.reading():
                    model(prompt(40), use_cache=True, **{CACHE: None})
            else:
                model(prompt(40), use_cache=True)
        settled = states.settled[1]
        seen.append([states.top, settled.hidden, settled.embedding, settled.deep])
    assert all(map(torch.equal, *seen))
    with pytest.raises(IndexError), run.reading():
        model(torch.tensor([[10**6]]))
    assert not any("forward" in layer.__dict__ for layer in text_decoder(model).layers)


def test_activations_outside_of_vectors(model: PreTrainedModel) -> None:
    """SiLU is the same there; an activation that is not is taken where all lies in vectors."""
    assert is_steady(nn.SiLU(), table_of(nn.SiLU()))
    table = table_of(nn.SiLU())
    table[0x3F80] = 0.5
    assert not is_steady(nn.SiLU(), table)
    run = layers_of(model)
    assert all(run._activates(rows) for rows in range(2, 700, 37))
    run.steady = False
    inner = run.native.parts[0].inner
    assert run._activates(8) and run._activates(4 * (native.GRAIN // inner))
