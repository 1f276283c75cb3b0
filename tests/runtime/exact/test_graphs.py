"""When segments are used and when not: the probe, stale recordings, hooks, waits. The last tests need a GPU."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import runtime.exact.prepared
import runtime.exact.probe
import runtime.generate
from runtime import detach
from runtime.exact.attention import _stock_attention
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.probe import certify, probe
from runtime.exact.static import StaticCache
from tests.helpers.families import prompt, tiny
from tests.helpers.graphs.fake_cuda import pretend
from tests.helpers.graphs.segments import GREEDY, STATIC, attached, same_ids

pytestmark = pytest.mark.usefixtures("own_certificates")


@pytest.mark.usefixtures("whole_probes")
def test_the_certificate_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the policy, apart from that of the ordinary path; a row alone was compared too."""
    model = tiny("llama")
    first = certify(model, "sha256:base", max_width=3, exactness="batched", static=True)
    assert first.policy.static and not first.bitwise and 0 < first.largest_shift < 1e-3 and first.max_width == 3
    assert first.rows_checked == 32 + 2 * 16 + 3 * 10 + 16 + 2 * 8 + 3 * 5
    assert "segments of fixed shapes" in str(first)
    with monkeypatch.context() as patch:
        patch.delattr(runtime.exact.probe, "probe")
        assert certify(model, "sha256:base", max_width=3, exactness="batched", static=True).policy == first.policy
    assert not certify(model, "sha256:base", max_width=3, exactness="batched").policy.static


def test_bitwise_goes_without_where_bits_differ(caplog: pytest.LogCaptureFixture) -> None:
    """As they do on a CPU: the ordinary path, bit for bit, and one warning."""
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    specbound = attached(model, stock, exactness="bitwise")
    for _ in range(2):
        assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    assert specbound.certificate is not None and specbound.certificate.bitwise
    assert not specbound.certificate.policy.static and specbound.prepared.static is None
    assert [record.message for record in caplog.records if "graphs" in record.message] == [
        "SpecBound: no graphs, because on this machine they have other bits; exactness='batched' takes them."
    ]


def by_mask(stock: str, module: Any, query: Any, key: Any, value: Any, mask: torch.Tensor, **kwargs: Any) -> Any:
    """Attention with plain decoding's bits: each row on the keys that the mask leaves it."""
    rows = []
    for row, seen in enumerate((mask[0, 0] == 0).sum(-1).tolist()):
        own = query[:, :, row : row + 1], key[:, :, :seen], value[:, :, :seen]
        rows.append(_stock_attention(stock, module)(module, *own, None, **kwargs)[0])
    return torch.cat(rows, dim=1), None


def test_bitwise_takes_segments_that_keep_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here attention is made to, and Linears run row by row: padding and masks change nothing, ids are stock's."""
    AttentionInterface.register("by_mask", lambda *args, **kwargs: by_mask("sdpa", *args, **kwargs))

    @contextmanager
    def exact(model: Any, policy: ExecutionPolicy, *more: Any) -> Iterator[None]:
        with execution(model, policy, *more):
            if policy.static:
                model.config._attn_implementation = "by_mask"
            yield

    monkeypatch.setattr(runtime.exact.probe, "execution", exact)
    monkeypatch.setattr(runtime.exact.prepared, "execution", exact)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        stock = model.generate(prompt(), **GREEDY)
        specbound = attached(model, stock, exactness="bitwise")
        assert torch.equal(model.generate(prompt(), **GREEDY), stock)
        certificate = specbound.certificate
        assert certificate is not None and certificate.bitwise and certificate.policy.static
        assert specbound.stats.accepted.total() > 3
    # Negative control: the same without Linears row by row is refused in float32.
    monkeypatch.setattr(runtime.exact.probe, "_candidates", lambda *args: [STATIC])
    assert not probe(tiny("llama"), max_width=3, static=True).bitwise


def test_negative_control_a_mask_that_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail, and the certificate says by how much."""
    reserve = StaticCache._reserve

    def blind(self: StaticCache, *args: Any) -> None:
        reserve(self, *args)
        self._columns = self._columns.clamp(max=0)

    monkeypatch.setattr(StaticCache, "_reserve", blind)
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    specbound = attached(model, stock)
    assert not torch.equal(model.generate(prompt(), **GREEDY), stock)
    assert specbound.certificate is not None and specbound.certificate.largest_shift > 0.1


@pytest.mark.parametrize("way", ["twin", "recorded"], indirect=True)
def test_negative_control_a_position_that_is_a_number(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording would keep for good: the twin cannot tell, the recorded form does."""
    segment = StaticCache._segment

    def frozen(self: StaticCache, through: Any, hidden: torch.Tensor, start: int, stop: int, tree: Any) -> Any:
        self._start = torch.full((2,), self.lengths[start])
        return segment(self, through, hidden, start, stop, tree)

    monkeypatch.setattr(StaticCache, "_segment", frozen)
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    attached(model, stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock) == (way == "twin")


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that reads a number back from the device: plain decoding, and why."""
    pretend(monkeypatch)
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    layer = model.model.layers[2].mlp
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: forward(self, x) * float(x.isfinite().all()))
    monkeypatch.setattr(runtime.exact.prepared, "why_stock", lambda model: None)  # code of others would decode plainly
    attached(model, stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    assert "switch graphs off: operation not permitted" in caplog.text and model.specbound.stats.rounds == 0
    assert model.config._attn_implementation == "sdpa"


def test_weights_put_elsewhere_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in place they are read where they were; put elsewhere, or in another dtype, graphs are dropped."""
    pretend(monkeypatch)
    model = tiny("llama")
    specbound = attached(model, model.generate(prompt(), **GREEDY))

    def turn(layer: int, *, in_place: bool) -> None:
        module = model.model.layers[layer].mlp.down_proj
        with torch.no_grad():
            if in_place:
                module.weight.mul_(-1.5)
            else:
                module.weight = torch.nn.Parameter(module.weight * -1.5)

    assert same_ids(model, prompt(), **GREEDY)
    first = specbound.prepared.static
    assert same_ids(model, prompt(), **GREEDY) and specbound.prepared.static is first
    turn(1, in_place=True)
    assert same_ids(model, prompt(), **GREEDY)
    first = specbound.prepared.static
    turn(2, in_place=False)
    assert same_ids(model, prompt(), **GREEDY) and specbound.prepared.static is not first
    second = specbound.prepared.static
    model.set_attn_implementation("eager")
    assert same_ids(model, prompt(), **GREEDY) and specbound.prepared.static is not second
    model.to(torch.float64)
    assert same_ids(model, prompt(), **GREEDY)
    monkeypatch.setattr(specbound.prepared, "look", lambda model: None)  # negative control
    monkeypatch.setattr(runtime.exact.prepared, "addresses", lambda model: specbound.prepared._addresses)
    turn(0, in_place=False)
    assert not same_ids(model, prompt(), **GREEDY)


def test_copies_and_detached_models() -> None:
    """A copy has buffers of its own; a model without its adapter has none."""
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    specbound = attached(model, stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    copied = copy.deepcopy(model)
    assert copied.specbound.prepared.static is None and specbound.prepared.static is not None
    assert torch.equal(copied.generate(prompt(), **GREEDY), stock)
    assert copied.specbound.prepared.static is not specbound.prepared.static
    assert torch.equal(detach(model).generate(prompt(), **GREEDY), stock)


def test_copies_of_recorded_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded for one is not replayed for the other."""
    pretend(monkeypatch)
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    attached(model, stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[1].mlp.down_proj.weight.zero_()
    with copied.specbound.disabled():
        other = copied.generate(prompt(), **GREEDY)
    assert not torch.equal(other, stock) and torch.equal(copied.generate(prompt(), **GREEDY), other)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock)
