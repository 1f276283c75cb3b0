"""What turns ids into text {plain, SpecBound}: streamers and pipelines give the same pieces."""

from collections.abc import Callable
from threading import Thread
from typing import Any

from transformers import (
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from tests.helpers.speculation import NEW_TOKENS, PROMPT, with_speculation


def test_text_streamers(model: Any, plain: list[int], make_tokenizer: Callable[..., Any], capsys: Any) -> None:
    """TextStreamer prints the same; TextIteratorStreamer yields the same pieces."""
    tokenizer = make_tokenizer()
    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(**options, streamer=TextStreamer(tokenizer))
    stock = capsys.readouterr().out
    with_speculation(model, [0] * 7 + plain, lambda: model.generate(**options, streamer=TextStreamer(tokenizer)))
    assert capsys.readouterr().out == stock

    def pieces() -> list[str]:
        """What the iterator yields while a thread generates."""
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        worker = Thread(target=model.generate, kwargs=options | {"streamer": streamer})
        worker.start()
        found = list(streamer)
        worker.join()
        return found

    assert with_speculation(model, [0] * 7 + plain, pieces)[0] == pieces()


def test_pipeline(model: Any, plain: list[int], make_tokenizer: Callable[..., Any]) -> None:
    """`pipeline("text-generation")` takes the model as any other and gives the same text."""
    tokenizer = make_tokenizer()
    text = tokenizer.decode(PROMPT[0])

    def ask() -> Any:
        """The pipeline's text."""
        return pipeline("text-generation", model=model, tokenizer=tokenizer)(text, max_new_tokens=9, do_sample=False)

    stock = ask()
    found, specbound = with_speculation(model, [0] * 7 + plain, ask)
    assert found == stock
    assert specbound.stats.accepted.total() > 0
