"""Where graphs are not taken, what waits for the device, and what only a GPU can show."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime import SpeculationBounds, detach, load_specbound, save_adapter
from runtime.decoding.cache import KVCache
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.exact.static import StaticCache, addresses, why_not
from runtime.generate import attach
from runtime.loading import make_specbound
from tests.helpers.families import FAMILIES, prompt, tiny
from tests.helpers.graphs.fake_cuda import Tape
from tests.helpers.graphs.segments import GREEDY, attached, in_blocks, prefilled, same_ids
from tests.helpers.speculation import PROMPT
from train.replay.profile import measure

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.usefixtures("own_certificates")


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
    state = DecodeState(made.prepared.layers, cache, PROMPT[0].tolist())
    state.deep = torch.zeros(32)
    with torch.no_grad(), made.prepared.running(model):
        for _ in range(2):  # the second time nothing is made that stays
            with Waits(monkeypatch) as waits:
                for token in (3, 4, 5, 6, 7, 8):
                    waits.seen.clear()
                    node = state.push(token)
                    state.advance(2)
                    made.drafter.propose(2, state, [node], 2)
                    assert waits.seen == ["tolist"]
                    state.advance(4)
                    made.drafter.propose(4, state, [node], 2)
                    assert waits.seen == ["tolist"] * 2
                waits.seen.clear()
                state.verify()
                state.settle([])
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
    assert len(runs) > 20 and set(costs.layer) == {1, 2} and costs.conditions["graphs"]


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
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
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
