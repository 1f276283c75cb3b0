"""Packed Linears: which go together, that they follow the model, and that none is used that has other bits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tests_heads import FakeHeads
from torch import nn

from runtime import SpeculationBounds, packed
from runtime.exactness import Reference, compare, packed_rows, probe
from runtime.execution import ExecutionPolicy, execution
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.packed import JointLinear, PackedLinears

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU whose oneDNN multiplies bfloat16, and a folder of its own for certificates."""
    if not packed._has_operators():
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
    joint = JointLinear(modules)
    first, second = joint.forwards(joint)
    one, other = torch.randn(2, 1, 3, 32).to(torch.bfloat16)
    for given in (one, other, one):
        assert torch.allclose(first(given), modules[0](given), atol=0.05)
        assert torch.allclose(second(given), modules[1](given), atol=0.05)
    assert joint._input is None
    assert torch.allclose(second(other), modules[1](other), atol=0.05)
    first(one)
    assert torch.allclose(second(other), modules[1](other), atol=0.05)


def test_execution_leaves_the_modules_as_they_were(model: Any) -> None:
    """After a block, and after an exception in one."""
    found = PackedLinears.of(model)
    assert found is not None
    policy = ExecutionPolicy(True, packed_rows={joint.shape: None for joint in found.joint})
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
    everything = ExecutionPolicy(True, packed_rows={joint.shape: None for joint in found.joint})
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
    first = specbound.packed
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-1.5)
    assert same()
    if first is not None:  # on a machine where something passed
        assert specbound.packed is not first


def test_nothing_is_packed_without_room_or_in_another_dtype(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the model's own Linears run."""
    assert PackedLinears.of(make_model(**WIDE)) is None  # float32
    assert PackedLinears.of(make_model().to(torch.bfloat16)) is None  # too small
    monkeypatch.setattr(packed, "_free_memory", lambda: 0)
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
