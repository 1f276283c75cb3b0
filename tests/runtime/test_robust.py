"""What happens around a call of `generate`: threads, modes, moves, interruptions. The model stays right."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from runtime import SpecBoundError, SpeculationBounds, detach
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.speculation import NEW_TOKENS, PROMPT, with_speculation


def test_two_threads_on_one_model(model: Any, plain: list[int]) -> None:
    """The second gets a clear error, the first its tokens."""
    errors: list[Exception] = []

    class Intruder(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            """Another thread asks the same model, once the first has begun to decode."""
            if value.numel() == 1 and not errors:
                worker = Thread(target=self.ask)
                worker.start()
                worker.join()

        def ask(self) -> None:
            """What the other thread does."""
            try:
                model.generate(PROMPT, max_new_tokens=3)
            except SpecBoundError as error:
                errors.append(error)

        def end(self) -> None:
            """Nothing."""

    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    stock = model.generate(**options)
    found, _ = with_speculation(model, stock[0].tolist(), lambda: model.generate(**options, streamer=Intruder()))
    assert torch.equal(found, stock)
    assert [str(error) for error in errors] == [
        "this model is generating already: give each thread its own model, or call generate again after it returns"
    ]


def test_train_mode_and_autocast_are_plain(model: Any, plain: list[int]) -> None:
    """Neither speculates, both give stock's ids."""
    options = {"inputs": PROMPT, "max_new_tokens": 6, "do_sample": False}

    def under_autocast() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.generate(**options)

    assert torch.equal(with_speculation(model, [0] * 7 + plain, under_autocast)[0], under_autocast())
    model.train()
    try:
        found, specbound = with_speculation(model, [0] * 7 + plain, lambda: model.generate(**options))
        assert torch.equal(found, model.generate(**options)) and specbound.stats.emitted == 0
    finally:
        model.eval()


def test_moved_to_another_dtype(model: Any, make_model: Any, make_adapter: Any) -> None:
    """After `model.to(bfloat16)` the heads follow, the probe runs anew, and ids are stock's."""
    from runtime.loading import make_specbound

    moved = make_model()
    specbound = make_specbound(moved, make_adapter(moved), exactness="bitwise")
    attach(moved, specbound)
    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        moved.to(dtype)
        found = moved.generate(**options)
        assert specbound.certificate is not None
        assert specbound.certificate.dtype == str(dtype).removeprefix("torch.")
        with specbound.disabled():
            assert torch.equal(found, moved.generate(**options))
        assert specbound.stats.drafted.total() > 0


class Interrupt(BaseStreamer):
    """Stops a generation after some tokens by an exception, as Ctrl-C or a reader that went away does."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def put(self, value: torch.Tensor) -> None:
        """Count, then raise."""
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError, GeneratorExit])
@pytest.mark.parametrize("after", [1, 2, 3, 5, 9])
def test_an_interrupted_call_leaves_nothing_behind(
    model: Any, plain: list[int], error: type[BaseException], after: int
) -> None:
    """At any token: modules and attention are as they were, the lock is free, the next call is right."""
    heads = FakeHeads("mixed", [2, 4], [*PROMPT[0].tolist(), *plain], vocabulary=128)
    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    attach(model, SpecBound(model, heads, SpeculationBounds(0.2, 4, 4)))
    try:
        with pytest.raises(error):
            model.generate(**options, streamer=Interrupt(after, error))
        assert model.config._attn_implementation == "sdpa"
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert model.generate(**options)[0, 7:].tolist() == plain
        assert model.specbound.stats.accepted.total() > 0
    finally:
        detach(model)


def test_generate_from_inside_generate(model: Any, plain: list[int]) -> None:
    """A streamer that asks the model for more gets a clear error: its modules are running blocks."""

    class Greedy(Interrupt):
        def put(self, value: torch.Tensor) -> None:
            """Ask again after the prompt."""
            if value.numel() == 1:
                model.generate(PROMPT, max_new_tokens=2, pad_token_id=0)

    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    with pytest.raises(SpecBoundError, match="after it returns"):
        with_speculation(model, plain, lambda: model.generate(**options, streamer=Greedy(0, OSError)))
    assert model.generate(**options)[0, 7:].tolist() == plain


def test_a_stream_left_early(model: Any, plain: list[int], make_tokenizer: Callable[..., Any]) -> None:
    """Whoever reads a TextIteratorStreamer may stop reading: the generation ends by itself, the next is right."""
    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}

    def leave() -> Any:
        streamer = TextIteratorStreamer(make_tokenizer(), skip_prompt=True)
        worker = Thread(target=model.generate, kwargs={**options, "streamer": streamer})
        worker.start()
        next(iter(streamer))
        worker.join()
        return model.generate(**options)

    found, _ = with_speculation(model, [*PROMPT[0].tolist(), *plain], leave)
    assert found[0, 7:].tolist() == plain


def test_inference_mode(model: Any, plain: list[int]) -> None:
    """As many people call `generate`; tensors of that mode must not stay behind and break the next call."""
    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}

    def calls() -> list[Any]:
        with torch.inference_mode():
            first = model.generate(**options)
        return [first, model.generate(**options)]

    found, specbound = with_speculation(model, [*PROMPT[0].tolist(), *plain], calls)
    assert [ids[0, 7:].tolist() for ids in found] == [plain, plain]
    assert specbound.stats.accepted.total() > 0
