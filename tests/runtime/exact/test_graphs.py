"""When segments are used and when not: the probe, stale recordings, hooks, waits. The last tests need a GPU."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

import runtime.exact.prepared
import runtime.exact.probe
import runtime.generate
from runtime import SpeculationBounds, UnsupportedModel, detach, load_specbound, save_adapter
from runtime.decoding.cache import KVCache
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.exact.attention import _stock_attention
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.probe import certify, probe
from runtime.exact.static import StaticCache, addresses, why_not
from runtime.generate import attach
from runtime.loading import make_specbound
from tests.helpers.fake_cuda import Tape, pretend
from tests.helpers.families import FAMILIES, prompt, tiny
from tests.helpers.segments import GREEDY, STATIC, attached, in_blocks, prefilled, same_ids
from tests.helpers.speculation import PROMPT
from train.replay.profile import measure

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.usefixtures("own_certificates")


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
    def exact(model: Any, policy: ExecutionPolicy, packed: Any = None) -> Iterator[None]:
        with execution(model, policy, packed):
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

    def frozen(self: StaticCache, through: Any, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        self._start = torch.full((2,), self.lengths[start])
        return segment(self, through, hidden, start, stop)

    monkeypatch.setattr(StaticCache, "_segment", frozen)
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    attached(model, stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock) == (way == "twin")


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that reads a number back from the device."""
    pretend(monkeypatch)
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    layer = model.model.layers[2].mlp
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: forward(self, x) * float(x.isfinite().all()))
    monkeypatch.setattr(runtime.exact.prepared, "why_stock", lambda model: None)  # code of others would decode plainly
    attached(model, stock)
    with pytest.raises(UnsupportedModel, match="switch graphs off: operation not permitted"):
        model.generate(prompt(), **GREEDY)
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


def test_hooks_and_several_devices_go_without(caplog: pytest.LogCaptureFixture) -> None:
    """A hook would run while recording and never after: the model decodes by stock's loop, and that is told once."""
    model = tiny("llama")
    stock = model.generate(prompt(), **GREEDY)
    specbound = attached(model, stock)
    assert torch.equal(model.generate(prompt(), **GREEDY), stock) and specbound.prepared.static is not None
    calls: list[int] = []
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        calls.clear()
        assert torch.equal(model.generate(prompt(), **GREEDY), stock)
        assert len(calls) == stock.shape[1] - prompt().shape[1]
    assert [record.message for record in caplog.records] == [
        "SpecBound: plain decoding for this call, because model.layers.2.mlp has a hook."
    ]
    hook.remove()
    assert torch.equal(model.generate(prompt(), **GREEDY), stock) and specbound.prepared.static is not None
    layers = DecoderLayers(model).layers
    assert why_not(layers) is None
    layers[1].to("meta")
    assert why_not(layers) == "its layers are on several devices (cpu, meta)"


def test_accelerate_hooks_go_without() -> None:
    """As `device_map` over several GPUs puts them on every module."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layers = DecoderLayers(tiny("llama")).layers
    add_hook_to_module(layers[3].self_attn, AlignDevicesHook("cpu"))
    assert "hooks" in str(why_not(layers))


def test_addresses_follow_the_weights() -> None:
    """Those of buffers too, such as the rotary frequencies."""
    model = tiny("llama")
    first = addresses(model)
    assert len(first) == len(list(model.parameters())) + len(list(model.buffers())) > len(list(model.parameters()))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    assert addresses(model) != first


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for a GPU: a number read back, or data of the host made a tensor there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        tolist = torch.Tensor.tolist

        def noted(tensor: torch.Tensor) -> Any:
            self.seen.append("tolist")
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and do."""
        name = func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "lift_fresh", "is_nonzero", "nonzero", "equal"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("static", [False, True])
def test_one_wait_an_exit_decision(
    make_model: Any, make_adapter: Any, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To push a token, climb to an exit and ask its head; verification waits for nothing."""
    model = make_model()
    made = make_specbound(model, make_adapter(model), exactness="batched")
    made.prepared.graphs = static
    made.prepare(model)
    cache = made.prepared.cache_of(prefilled(model, PROMPT), 40)
    assert isinstance(cache, StaticCache) == static
    state = DecodeState(made.prepared.layers, cache, PROMPT[0].tolist(), deep=torch.zeros(32))
    with torch.no_grad(), made.prepared.running(model):
        for _ in range(2):  # the second time nothing is made that stays
            with Waits(monkeypatch) as waits:
                for token in (3, 4, 5, 6, 7, 8):
                    waits.seen.clear()
                    state.push(token)
                    state.advance(2)
                    made.drafter.propose(2, state)
                    assert waits.seen == ["tolist"]
                    state.advance(4)
                    made.drafter.propose(4, state)
                    assert waits.seen == ["tolist"] * 2
                waits.seen.clear()
                state.verify()
                state.crop(8)
                assert waits.seen == []
                assert float(torch.tensor([3.0])) == 3.0  # negative control
                assert waits.seen == ["lift_fresh", "_local_scalar_dense"]


def test_loaded_with_graphs(make_model: Callable[..., Any], make_adapter: Any, tmp_path: Path) -> None:
    """With the switch on; without it nothing is static."""
    model = make_model()
    save_adapter(make_adapter(model), tmp_path / "adapter")
    stock = model.generate(PROMPT, **GREEDY)
    loaded = load_specbound(tmp_path / "adapter", model, exactness="batched", adaptive=False)
    loaded.specbound.prepared.graphs = True
    loaded.specbound.prepare(loaded)
    assert loaded.specbound.certificate.policy.static
    assert torch.equal(loaded.generate(PROMPT, **GREEDY), stock)
    assert loaded.specbound.stats.drafted.total() > 0 and isinstance(loaded.specbound.prepared.static, StaticCache)
    loaded = load_specbound(tmp_path / "adapter", detach(model), exactness="batched", adaptive=False)
    assert torch.equal(loaded.generate(PROMPT, **GREEDY), stock)
    assert not loaded.specbound.certificate.policy.static and loaded.specbound.prepared.static is None


def test_costs_are_those_of_segments(make_model: Any, make_adapter: Any, way: str) -> None:
    """What `specbound profile` measures runs over static caches as well."""
    model = make_model()
    specbound = make_specbound(model, make_adapter(model), exactness="batched")
    specbound.prepared.graphs = True
    specbound.bounds = SpeculationBounds(0.0, 4, 1)
    attach(model, specbound)
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        run = StaticCache.run
        patch.setattr(StaticCache, "run", lambda self, *args: runs.append(1) or run(self, *args))
        costs = measure(model, max_width=2, repeats=1, progress=False)
    assert len(runs) > 20 and min(costs.layer.values()) > 0 and costs.conditions["graphs"]


def test_the_tape_is_as_strict_as_a_gpu() -> None:
    """It replays without Python, into the same memory, and forbids what a capture forbids."""
    given, number = torch.ones(3), [2.0]
    tape = Tape()
    with tape:
        output = given * number[0] + 1
    given.fill_(5.0)
    number[0] = 100.0
    tape.replay()
    assert output.tolist() == [11.0] * 3
    for forbidden in (lambda: given.sum().item(), lambda: torch.tensor([1.0]), lambda: bool(given.all())):
        with pytest.raises(RuntimeError, match="capturing"), Tape():
            forbidden()


@GPU
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_on_a_gpu_ids_are_stocks(family: str) -> None:
    """Recorded and replayed for real, float32: greedy and sampled, twice, and in a text that makes the cache grow."""
    model = tiny(family).to("cuda")
    specbound = attached(model, prompt())
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
        for length, new in ((7, 40), (7, 40), (200, 100)):
            assert same_ids(model, prompt(length).to("cuda"), max_new_tokens=new, **options)
            assert specbound.stats.accepted.total() > 3
            assert specbound.prepared.static is not None and len(specbound.prepared.static.graphs) > 3


@GPU
def test_on_a_gpu_segments_wait_for_nothing() -> None:
    """Once recorded, torch's own check of synchronisations passes; states that are kept are not written over."""
    model = tiny("llama").to("cuda")
    ids = prompt(40).to("cuda")
    static = StaticCache.from_dynamic(prefilled(model, ids[:, :7]), 40)
    in_blocks(model, static, ids, 7, [1, 3, 4])
    static.crop(7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = in_blocks(model, static, ids, 7, [1, 3, 4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ordinary = KVCache.from_dynamic(prefilled(model, ids[:, :7]), 40)
    for one, other in zip(kept, in_blocks(model, ordinary, ids, 7, [1, 3, 4]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
