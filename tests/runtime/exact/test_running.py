"""Whatever is done to the model after load: ids stay those of its own plain decoding, or it decodes plainly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from runtime.exact import packed, running
from runtime.exact.fingerprint import checksum
from tests.helpers.attached import GREEDY, PROMPT, attached_model, same, speculated

pytestmark = pytest.mark.usefixtures("own_certificates")


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """With biases, in bfloat16."""
    return attached_model(make_model)


def write_data(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.mul_(-1.5)


def write_one(model: Any) -> None:
    model.lm_head.weight.data[int(model.generate(PROMPT, **GREEDY)[0, 9])] = 0.0


def write_bias(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()


def swap_rows(model: Any) -> None:
    for layer in model.model.layers:
        weight = layer.mlp.gate_proj.weight.data
        weight[[0, 1]] = weight[[1, 0]]


WRITES = [write_data, write_one, write_bias, swap_rows]


@pytest.mark.parametrize("write", WRITES)
def test_packed_copies_follow_every_write(packs: None, model: Any, write: Callable[[Any], None]) -> None:
    assert same(model) and speculated(model) and model.specbound.prepared.packed is not None
    with model.specbound.disabled():
        write(model)
    assert same(model) and speculated(model)


def test_negative_control_without_the_checksum(packs: None, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "sums", lambda parts: torch.empty(0))
    assert same(model)
    write_data(model)
    assert not same(model)


@pytest.mark.parametrize("shape", [(7,), (64, 5), (128, 64), (400, 801), (300001,)])
def test_a_checksum_sees_one_bit_and_exchanged_rows_and_columns(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(shape).to(torch.bfloat16)
    first = checksum(tensor)
    for place in (0, tensor.numel() // 2, tensor.numel() - 1):
        changed = tensor.clone()
        changed.view(torch.int16).view(-1)[place] ^= 1
        assert not torch.equal(checksum(changed), first)
    assert torch.equal(checksum(tensor.clone()), first)
    for dimension in range(tensor.dim()):
        order = torch.arange(tensor.shape[dimension])
        order[[0, 4]] = order[[4, 0]]
        assert not torch.equal(checksum(tensor.index_select(dimension, order)), first)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (0, 4), (2, 2)])
def test_a_checksum_of_less_than_a_word_a_row(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=torch.bfloat16)
    assert torch.equal(checksum(tensor), checksum(tensor.clone()))
    assert not tensor.numel() or not torch.equal(checksum(tensor), checksum(2 * tensor))


def mixing(module: nn.Module, args: Any, output: Any) -> Any:
    return output + output.mean(1, keepdim=True)


class Flipped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return -self.inner(hidden)


def wrapped(model: Any) -> None:
    forward = model.forward

    def flipping(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = flipping


def subclassed(model: Any) -> None:
    class Other(type(model.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = -output.last_hidden_state
            return output

    model.model.__class__ = Other


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook on the model": lambda m: m.register_forward_hook(lambda s, a, o: setattr(o, "logits", -o.logits)),
    "hook on the body": lambda m: m.model.register_forward_pre_hook(
        lambda s, a, k: (a, k | {"input_ids": 127 - k["input_ids"]}), with_kwargs=True
    ),
    "hook on the norm": lambda m: m.model.norm.register_forward_hook(lambda s, a, o: -o),
    "hook that mixes rows": lambda m: m.model.layers[2].register_forward_hook(mixing),
    "model.forward": wrapped,
    "subclass of the body": subclassed,
    "lm_head": lambda m: setattr(m, "lm_head", Flipped(m.lm_head)),
    "compiled": lambda m: setattr(m.model.layers[1].mlp, "_compiled_call_impl", m.model.layers[1].mlp._call_impl),
    "one module in training mode": lambda m: m.model.layers[3].mlp.train(),
    "fewer layers": lambda m: setattr(m.config, "num_hidden_layers", 4),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_code_of_others_decodes_by_stocks_loop(model: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert same(model) and speculated(model)
    CHANGES[name](model)
    assert same(model) and not speculated(model) and same(model)
    assert sum("plain decoding for this call" in record.message for record in caplog.records) == 1


def test_a_transformers_that_is_not_known_decodes_by_stocks_loop(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It calls caches by another name; what to install is said."""
    monkeypatch.setattr(running, "CACHE", "")
    model.specbound.prepared._forget()
    assert same(model) and not speculated(model)
    assert "pip install 'transformers<5.25'" in caplog.text


def test_negative_control_code_of_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that does nothing while it is probed, and flips the logits afterwards."""
    armed: list[int] = []
    model.register_forward_hook(lambda s, a, o: setattr(o, "logits", -o.logits) if armed else None)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.exact.prepared.why_stock", lambda model: None)
        assert same(model) and speculated(model)
        armed.append(1)
        assert not same(model)
    model.specbound.prepared._forget()
    assert same(model) and not speculated(model)


def reheaded(model: Any) -> None:
    model.set_output_embeddings(nn.Linear(128, 128, bias=False, dtype=torch.bfloat16))


def relayered(model: Any) -> None:
    model.model.layers[2] = copy.deepcopy(model.model.layers[3])
    model.model.layers[2].self_attn.layer_idx = 2
    model.model.layers[2].self_attn.config = model.config  # a copy of it would attend in another way than the rest


@pytest.mark.parametrize("change", [reheaded, relayered])
def test_replaced_modules_are_read_again(packs: None, model: Any, change: Callable[[Any], None]) -> None:
    assert same(model)
    change(model)
    assert same(model) and speculated(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_added_merged_and_unmerged(packs: None, model: Any) -> None:
    """Each time probed anew."""
    assert same(model)
    settings = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    carrier = get_peft_model(model, settings)
    assert same(model) and speculated(model)
    for change in (carrier.merge_adapter, carrier.unmerge_adapter):
        change()
        assert same(model) and speculated(model)
    with carrier.disable_adapter():
        assert same(model)
    assert same(carrier.merge_and_unload()) and speculated(model)


@pytest.mark.parametrize("change", ["turned", "shifted bias"])
def test_weights_that_are_no_whole_words_are_not_packed(packs: None, model: Any, change: str) -> None:
    """A transposed layout, or memory that begins between two words: that Linear runs as it is, the rest packed."""
    linear = model.model.layers[1].mlp.down_proj
    if change == "turned":
        linear.weight = nn.Parameter(linear.weight.data.t().contiguous().t())
    else:
        linear.bias = nn.Parameter(torch.randn(len(linear.weight) + 1).bfloat16()[1:])
    assert not packed._is_packable(linear) and packed._is_packable(model.model.layers[2].mlp.down_proj)
    assert same(model) and speculated(model)
    found = packed.PackedLinears.of(model)
    assert found is not None and found.current()
    assert all(linear not in joint.modules for joint in found.joint) and len(found.joint) > 3
