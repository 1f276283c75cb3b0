"""Packed Linears and fused layers: what goes together, follows the model, and is not used where bits differ."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from runtime import SpeculationBounds
from runtime.decoding.cache import KVCache
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.exact import packed
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.fused import FusedLayer
from runtime.exact.native.layout import ONEDNN
from runtime.exact.packed import JointLinear, PackedLinears
from runtime.exact.probe import Reference, compare, packed_rows, probe
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.loading import make_specbound
from tests.helpers.fake_heads import FakeHeads

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU whose oneDNN multiplies bfloat16, and a folder of its own for certificates."""
    if not packed.has_onednn():
        pytest.skip("this CPU's oneDNN has no bfloat16: nothing is packed here")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    yield


@pytest.fixture
def model(make_model: Any) -> Any:
    """A tiny base in bfloat16, just wide enough."""
    return make_model(**WIDE).to(torch.bfloat16)


def test_linears_that_read_the_same_input_go_together(model: Any) -> None:
    """Query, key and value; gate and up; the others alone; each module once."""
    found = PackedLinears.of(model)
    assert found is not None
    names = {module: name for name, module in model.named_modules()}
    groups = [[names[module].split(".")[-1] for module in joint.modules] for joint in found.joint]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups == layer * len(model.model.layers) + [["lm_head"]]


@pytest.mark.parametrize("bias", [False, True])
def test_each_part_gets_its_own_output(bias: bool) -> None:
    """Whoever calls first; with another input in between nothing is mixed up; nothing is kept after the last."""
    torch.manual_seed(0)
    modules = [nn.Linear(32, size, bias=bias, dtype=torch.bfloat16) for size in (512, 1024)]
    joint = JointLinear(modules, ONEDNN)
    first, second = joint.forwards(joint)
    one, other = torch.randn(2, 1, 3, 32).to(torch.bfloat16)
    for given in (one, other, one):
        assert torch.allclose(first(given), modules[0](given), atol=0.05)
        assert torch.allclose(second(given), modules[1](given), atol=0.05)
    assert all(part.func.__self__._input is None for part in (first, second))
    assert torch.allclose(second(other), modules[1](other), atol=0.05)
    first(one)
    assert torch.allclose(second(other), modules[1](other), atol=0.05)


def test_execution_leaves_the_modules_as_they_were(model: Any) -> None:
    """After a block, and after an exception in one."""
    found = PackedLinears.of(model)
    assert found is not None
    policy = ExecutionPolicy("rowwise", packed_rows={joint.shape: None for joint in found.joint})
    token_ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(token_ids).logits
        with execution(model, policy, found):
            assert any("forward" in module.__dict__ for module in model.modules())
        with pytest.raises(KeyError), execution(model, policy, found):
            raise KeyError
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(model(token_ids).logits, before)


def test_what_has_other_bits_is_not_packed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed form off by a rounding step: left out by the probe, and the model certified without it."""
    found = PackedLinears.of(model)
    assert found is not None
    down = (model.config.hidden_size, model.config.intermediate_size)
    stock = JointLinear.__call__

    def shifted(self: JointLinear, hidden: torch.Tensor) -> torch.Tensor:
        return stock(self, hidden) * (1.01 if self.shape == down else 1.0)

    monkeypatch.setattr(JointLinear, "__call__", shifted)
    near = Reference.near(model)
    assert down not in packed_rows(near, found, [1, 2, 3])
    certificate = probe(model, max_width=3, packed=found)
    assert certificate.bitwise and down not in certificate.policy.packed_rows
    everything = ExecutionPolicy("rowwise", packed_rows={joint.shape: None for joint in found.joint})
    assert compare(model, near, everything, [1, 2], packed=found).differing > 0  # negative control


def test_generation_follows_weights_that_change(model: Any) -> None:
    """Weights written in place, or a module put in another's place, are packed anew: ids stay stock's."""
    prompt = torch.tensor([[5, 9, 2, 7]])
    attach(model, SpecBound(model, FakeHeads("random", [1]), SpeculationBounds(0.5, 1, 3)))
    specbound = model.specbound

    def same() -> bool:
        output = model.generate(prompt, **GREEDY)
        with specbound.disabled():
            return torch.equal(output, model.generate(prompt, **GREEDY))

    assert same()
    first = specbound.prepared.packed
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-1.5)
    assert same()
    if first is not None:  # on a machine where something passed
        assert specbound.prepared.packed is not first


def test_nothing_is_packed_without_room_or_in_another_dtype(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the model's own Linears run."""
    assert PackedLinears.of(make_model(**WIDE).to(torch.float16)) is None
    assert PackedLinears.of(make_model().to(torch.bfloat16)) is None  # too small
    monkeypatch.setattr(packed, "free_memory", lambda: 0)
    assert PackedLinears.of(make_model(**WIDE).to(torch.bfloat16)) is None


def test_a_hooked_or_unusual_linear_is_left_alone(model: Any) -> None:
    """Another class, or a forward that another library put there."""

    class Own(nn.Linear):
        """As quantized Linears are."""

    model.model.layers[0].mlp.down_proj.__class__ = Own
    hooked = model.model.layers[1].mlp.down_proj
    hooked.forward = lambda hidden: nn.Linear.forward(hooked, hidden)
    found = PackedLinears.of(model)
    assert found is not None
    taken = {module for joint in found.joint for module in joint.modules}
    assert model.model.layers[0].mlp.down_proj not in taken
    assert hooked not in taken and model.model.layers[2].mlp.down_proj in taken


def fused_policy(found: PackedLinears) -> ExecutionPolicy:
    """Everything packed, attention row by row, layers fused."""
    return ExecutionPolicy("rowwise", packed_rows={joint.shape: None for joint in found.joint}, fused=True)


@pytest.mark.parametrize("shared", [1, 2])
def test_a_fused_layer_computes_what_its_modules_do(make_model: Any, shared: int) -> None:
    """Blocks and single rows, heads shared or not, on a cache that is not empty; the cache gets the same rows."""
    model = make_model(**WIDE | {"num_key_value_heads": 4 // shared, "head_dim": 64}).to(torch.bfloat16)
    found = PackedLinears.of(model)
    assert found is not None
    layers, policy = DecoderLayers(model), fused_policy(found)
    token_ids = torch.arange(1, 9)[None]
    outputs, caches = [], []
    for fused in (True, False):
        cache = KVCache(layers.num_layers, 16)
        with torch.no_grad(), execution(model, replace(policy, fused=fused), found):
            patched = [layer for layer in model.model.layers if "forward" in layer.__dict__]
            assert len(patched) == (layers.num_layers if fused else 0)
            parts = []
            for start, stop in ((0, 4), (4, 5), (5, 8)):
                hidden = layers.embed(token_ids[:, start:stop], start)
                parts.append(layers.run(hidden, 0, layers.num_layers, start, cache))
        outputs.append(torch.cat(parts, dim=1))
        caches.append(cache)
    assert torch.allclose(outputs[0], outputs[1], rtol=0.05, atol=0.05)
    for index in range(layers.num_layers):
        for mine, theirs in zip(caches[0].rows(index, 0), caches[1].rows(index, 0), strict=True):
            assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=0.05, atol=0.05)


def test_a_layer_that_is_listened_to_or_of_another_kind_is_not_fused(model: Any) -> None:
    """Hooks of the user's run; a layer that is not as expected runs its own forward."""
    found = PackedLinears.of(model)
    assert found is not None
    calls = []
    handle = model.model.layers[2].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.model.layers[3].mlp.act_fn = nn.GELU()
    with execution(model, fused_policy(found), found):
        fused = ["forward" in layer.__dict__ for layer in model.model.layers]
        assert fused == [True, True, False, False, True, True]
        layers = DecoderLayers(model)
        with torch.no_grad():
            layers.run(layers.embed(torch.tensor([[1, 2]]), 0), 0, 6, 0, KVCache(6, 8))
    handle.remove()
    assert calls == [1]
    model.config._attn_implementation = "eager"  # a fused layer knows scaled dot product attention only
    with execution(model, fused_policy(found), found):
        assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    model.config._attn_implementation = "sdpa"
    model.config.model_type = "gemma"
    with execution(model, fused_policy(found), found):
        assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_heads_run_packed_and_follow_the_base(model: Any, make_adapter: Any) -> None:
    """In bfloat16 from copies, in float32 from their own weights again; the same drafts either way."""
    attached = make_specbound(model, make_adapter(model, head_rank=64, draft_vocab_size=127), exactness="bitwise")
    drafter, layers = attached.drafter, attached.prepared.layers
    state = DecodeState(layers, KVCache(6, 8), [1, 2])
    with torch.no_grad():
        state.push(3)
        state.advance(2)
        unpacked = drafter.propose(2, state, [0], 1)[0][0]
        drafter = drafter.on(layers)
        packed.pack_in_place(drafter.modules)
        linears = [module for module in drafter.heads.exits.modules() if isinstance(module, nn.Linear)]
        assert all("forward" in module.__dict__ for module in linears if module.weight.numel() >= packed.MIN_WEIGHTS)
        assert any("forward" in module.__dict__ for module in linears)
        for heads in (drafter.heads.exits, copy.deepcopy(drafter.heads.exits)):
            again = replace(drafter, heads=drafter.heads.with_exits(heads))
            token, confidence = again.propose(2, state, [0], 1)[0][0]
            assert token == unpacked[0] and abs(confidence - unpacked[1]) < 0.02
        assert heads.heads["2"].gate_up.weight is heads.heads["2"].gate_up.forward.args[0].weight
        drafter = drafter.on(DecoderLayers(model.float()))
        packed.pack_in_place(drafter.modules)
        assert not any("forward" in module.__dict__ for module in drafter.heads.exits.modules())


def test_fused_layers_with_other_bits_are_not_certified(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe goes on to the form without them."""
    found = PackedLinears.of(model)
    assert found is not None
    stock = FusedLayer._norm

    def shifted(self: FusedLayer, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return stock(self, index, hidden) * 1.01

    monkeypatch.setattr(FusedLayer, "_norm", shifted)
    monkeypatch.setattr("runtime.exact.probe.native_layers", lambda *_: None)  # it would be taken before
    certificate = probe(model, max_width=3, packed=found)
    assert certificate.bitwise and not certificate.policy.fused
