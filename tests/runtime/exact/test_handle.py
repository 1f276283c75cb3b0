"""The handle of a model: copies and pickles, threads, interruptions, what is used for a while."""

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from runtime import SpecBoundError, SpeculationBounds, detach
from runtime.decoding.families import CACHE
from runtime.exact import packed
from runtime.generate import attach
from tests.helpers.attached import GREEDY, PROMPT, attached_model, ids_of, same, speculated

pytestmark = pytest.mark.usefixtures("own_certificates")


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    """With biases, in bfloat16."""
    return attached_model(make_model)


def test_pickle_and_copies(packs: None, model: Any) -> None:
    assert same(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
    ):
        assert type(made) is type(model) and made.specbound.prepared.layers.layers[0] is made.model.layers[0]
        assert same(made) and speculated(made)
        assert type(detach(made)).__name__ == "LlamaForCausalLM"
    assert same(model)


def test_a_worker_that_is_spawned_gets_the_model_with_its_adapter(model: Any) -> None:
    """As a data loader or a pool hands it over."""
    assert same(model)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(ids_of, model).result()
    with model.specbound.disabled():
        assert found == model.generate(PROMPT, **GREEDY)[0].tolist()


class Interrupts(BaseStreamer):
    """Stops at the n-th call."""

    def __init__(self, calls: int, then: Callable[[], Any] | None = None) -> None:
        self.calls, self.then = calls, then

    def put(self, value: torch.Tensor) -> None:
        self.calls -= 1
        if self.calls == 0 and self.then is None:
            raise KeyboardInterrupt
        if self.calls == 0 and self.then is not None:
            self.then()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("calls", [1, 2, 3, 6, 9])
def test_an_interrupted_call_leaves_the_callers_cache_as_stock_does(model: Any, calls: int) -> None:
    assert same(model)
    caches = []
    for enabled in (True, False):
        model.specbound.enabled = enabled
        caches.append(DynamicCache())
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, streamer=Interrupts(calls), **{CACHE: caches[-1]}, **GREEDY)
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("outer", [False, True])
def test_threads_may_decode_plainly_side_by_side(model: Any, outer: bool) -> None:
    """And nobody beside a call that speculates."""
    failures: list[BaseException] = []

    def beside() -> None:
        try:
            model.generate(torch.cat([PROMPT, PROMPT]), **GREEDY)  # a batch: plain
        except SpecBoundError as error:
            failures.append(error)

    def start() -> None:
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()

    model.specbound.enabled = outer
    model.generate(PROMPT, streamer=Interrupts(3, start), **GREEDY)
    assert len(failures) == outer


def test_using_restores_what_was_before(model: Any) -> None:
    handle = model.specbound
    before = handle.bounds, handle.drafter, handle.controller, handle.exactness
    with pytest.raises(KeyError), handle.using(bounds=SpeculationBounds(0.5, 2, 1), exactness="batched"):
        assert handle.bounds.max_draft_tokens == 1 and handle.exactness == "batched"
        raise KeyError
    assert (handle.bounds, handle.drafter, handle.controller, handle.exactness) == before


def test_a_class_that_a_user_makes_of_ours_is_copied_as_it_is(model: Any) -> None:
    """Its copies keep it, with an adapter and without."""
    assert same(model) and speculated(model)

    class Halved(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 2 + output.logits.roll(1, -1)
            return output

    model.__class__ = Halved
    with model.specbound.disabled():
        stock = model.generate(PROMPT, **GREEDY)
    assert torch.equal(model.generate(PROMPT, **GREEDY), stock)
    for made in (copy.deepcopy(model), detach(copy.deepcopy(model))):
        assert type(made) is Halved and torch.equal(made.generate(PROMPT, **GREEDY), stock)
    handle = model.specbound
    attach(detach(model), handle)
    assert type(model) is Halved and torch.equal(model.generate(PROMPT, **GREEDY), stock)


def test_a_model_that_cannot_be_probed_decodes_plainly(model: Any) -> None:
    """Logits that are not numbers: stock goes on, and so does this."""
    model.lm_head.weight.data[0] = torch.nan
    assert same(model) and not speculated(model)


def test_no_drafts_are_asked_for(model: Any) -> None:
    model.specbound.bounds = SpeculationBounds(0.2, 4, 0)
    assert same(model)


def test_a_copy_in_the_middle_of_a_call_is_refused(model: Any) -> None:
    """Its modules compute blocks then; stock's can be copied, and so can this one where it decodes plainly."""
    assert same(model)
    refused: list[str] = []

    def copies() -> None:
        for make in (copy.deepcopy, pickle.dumps):
            try:
                make(model)
            except SpecBoundError as error:
                refused.append(str(error))

    model.generate(PROMPT, streamer=Interrupts(3, copies), **GREEDY)
    assert refused == ["this model is generating: copy or pickle it when generate has returned"] * 2
    with model.specbound.disabled():
        model.generate(PROMPT, streamer=Interrupts(3, copies), **GREEDY)
    assert len(refused) == 2 and same(copy.deepcopy(model))


def test_the_model_is_looked_at_once_a_call(packs: None, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits of packed weights are read for it."""
    assert same(model) and model.specbound.prepared.packed is not None
    looks: list[int] = []
    current = packed.PackedLinears.current
    monkeypatch.setattr(packed.PackedLinears, "current", lambda self: looks.append(1) or current(self))
    model.generate(PROMPT, **GREEDY)
    assert speculated(model) and len(looks) == 1
