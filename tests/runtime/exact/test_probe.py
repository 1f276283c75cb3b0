"""The probe finds what must run row by row, keeps what it found, and says so; a policy that fails is not certified."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import nn
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

import runtime.exact.probe
from runtime import SpeculationBounds
from runtime.decoding.emitter import TargetEmitter
from runtime.exact.execution import ExecutionPolicy, call_in_rows, execution, linears
from runtime.exact.probe import Agreement, Reference, compare, linear_rows, probe
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

pytestmark = pytest.mark.usefixtures("whole_probes")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for certificates."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path / "specbound"


class Shaky(nn.Linear):
    """A Linear whose rows change in the last bits with the number of rows, as some kernels do."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Off by a factor that only one-row calls do not have."""
        return super().forward(hidden) * (1.0 if hidden.shape[-2] == 1 else 1.0 + 2**-20)


class SteadyFrom8(nn.Linear):
    """A Linear that gives a row the same bits in every call, but for calls of 2 to 7 rows."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each row on its own, so that no kernel's shape plays a part."""
        rows = [super(SteadyFrom8, self).forward(row) for row in hidden.split(1, dim=-2)]
        return torch.cat(rows, dim=-2) * (1.0 if len(rows) == 1 or len(rows) >= 8 else 1.0 + 2**-20)


def with_down_proj(model: Any, kind: type[nn.Linear]) -> Any:
    """The same model, its down projections of another class."""
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = kind
    return model


def test_a_linear_that_depends_on_rows_is_found(make_model: Any, kept: Path) -> None:
    """And the whole model passes with it row by row, and fails without (negative control)."""
    model = with_down_proj(make_model(), Shaky)
    near = Reference.near(model)
    shape = tuple(model.model.layers[0].mlp.down_proj.weight.shape)
    assert linear_rows(near, range(2, 5))[shape] == 1
    certificate = probe(model, max_width=4)
    assert certificate.bitwise and certificate.rows_differing == 0 and certificate.rows_checked > 50
    assert certificate.largest_shift == 0.0
    assert certificate.policy.rows_of(model.model.layers[0].mlp.down_proj) == 1
    others = {tuple(module.weight.shape): 1 for module in linears(model)}
    del others[shape]
    assert compare(model, near, ExecutionPolicy("rowwise", others), [3]).differing > 0
    assert compare(model, near, ExecutionPolicy.rowwise(), [3]) == Agreement(rows=30)


def test_a_linear_that_is_steady_from_some_rows_on_is_padded(make_model: Any, kept: Path) -> None:
    """One call of 8 rows in the place of one a row; the rows added change nothing."""
    model = with_down_proj(make_model(), SteadyFrom8)
    module = model.model.layers[0].mlp.down_proj
    near = Reference.near(model)
    assert linear_rows(near, range(2, 5))[tuple(module.weight.shape)] == 8
    certificate = probe(model, max_width=4)
    assert certificate.bitwise and certificate.policy.rows_of(module) == 8
    assert "padded rows: Linear 32x64 to 8" in str(certificate)


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_calls_of_a_steady_number_of_rows(rows: int) -> None:
    """Every call but one of a single row has that many; what comes back is the block, in order."""
    calls = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.shape[-2])
        return hidden * 2

    block = torch.arange(22.0).view(1, 11, 2)
    assert torch.equal(call_in_rows(forward, rows, block), block * 2)
    assert set(calls) == {rows} and len(calls) == -(-11 // rows)
    calls.clear()
    assert torch.equal(call_in_rows(forward, rows, block[:, :1]), block[:, :1] * 2)
    assert calls == [1]


def test_attention_runs_in_groups_where_that_keeps_every_bit_and_never_as_a_block(
    make_model: Any, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 has other bits in groups, so groups are made to pass; a block may differ in one row of thousands."""
    monkeypatch.setattr("runtime.exact.probe.NATIVE_KINDS", ())
    assert probe(make_model(), max_width=3).policy.attention == "rowwise"

    def steady(model: Any, policy: ExecutionPolicy, packed: Any) -> Any:
        return execution(model, replace(policy, attention="rowwise"), packed)

    monkeypatch.setattr(runtime.exact.probe, "execution", steady)
    monkeypatch.setattr(runtime.exact.probe, "kind_in_order", lambda *args: True)
    certificate = probe(make_model(), max_width=3)
    assert certificate.bitwise and certificate.policy.attention == "grouped"


def test_rows_far_into_a_text_are_compared(make_model: Any, kept: Path) -> None:
    """Up to 2,064 keys, or as many as the model has positions; a fault only there is found."""
    assert probe(make_model(max_position_embeddings=4096), max_width=3).longest_context == 2064
    model = make_model()
    assert probe(model, max_width=3).longest_context == 512
    assert probe(make_model(max_position_embeddings=64), max_width=3).longest_context == 56

    def far_fault(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        hidden = args[0]
        late = bool((kwargs["position_ids"] > 400).any()) and hidden.shape[1] > 1
        return (hidden * (1.0 + 2**-20 if late else 1.0),), kwargs

    model.model.layers[3].register_forward_pre_hook(far_fault, with_kwargs=True)
    certificate = probe(model, max_width=3)
    assert not certificate.bitwise and certificate.max_width == 1


def test_the_batched_mode_says_how_far_it_is_off(make_model: Any, kept: Path) -> None:
    """Its certificate, kept like the other, and the tokens it cannot promise; exact blocks promise them all."""
    prompt = torch.arange(3, 12)[None]
    for exactness in ("batched", "bitwise"):
        model = make_model()
        truth = model.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
        heads = FakeHeads("mixed", [2, 4], truth, vocabulary=128)
        attach(model, SpecBound(model, heads, SpeculationBounds(0.3, 4, 4), exactness=exactness))
        for do_sample in (False, True):
            model.generate(prompt, max_new_tokens=40, do_sample=do_sample)
            stats, certificate = model.specbound.stats, model.specbound.certificate
            if exactness == "bitwise":
                assert stats.unpromised == 0 and certificate.bitwise
                continue
            assert not certificate.bitwise and certificate.max_width == 5 and certificate.largest_shift > 0
            assert certificate.rows_differing <= certificate.rows_checked
            assert stats.unpromised == 39 if do_sample else stats.unpromised < 39
    texts = [path.read_text() for path in kept.iterdir()]
    assert len(texts) == 2


def test_near_ties_are_counted() -> None:
    """A margin within twice the shift, from the second token on."""
    config = SimpleNamespace(
        do_sample=False, return_dict_in_generate=False, output_scores=False, output_logits=False, max_length=9
    )
    criteria = StoppingCriteriaList([MaxLengthCriteria(9)])
    emitter = TargetEmitter(torch.tensor([[1]]), LogitsProcessorList(), criteria, config, None)  # type: ignore[arg-type]
    emitter.largest_shift = 0.1
    for margin in (0.15, 0.15, 0.5, 0.2):
        emitter.emit(torch.tensor([[1.0, 1.0 - margin, -3.0]]))
    assert emitter.unpromised == 2
