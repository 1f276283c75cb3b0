"""The text of a call as it grows: joined pieces are stock's decoded text, stop strings never show, rounds are told."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime import SpeculationBounds, detach
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.text.transcript import Round, Token, Transcript, write
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.speculation import PROMPT

ASCII = {"\u0120", *map(chr, range(33, 127))}  # as byte-level tokenizers write it: the space is another sign


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that most characters take several; ids 0 to 94 are those of ASCII."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda symbol: (symbol not in ASCII, symbol))
    inner = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture
def speculating(model: Any, plain: list[int]) -> Any:
    """The model with heads right two times of three."""
    heads = FakeHeads("mixed", [2, 4], PROMPT[0].tolist() + plain, vocabulary=128)
    yield attach(model, SpecBound(model, heads, SpeculationBounds(0.2, 4, 4)))
    detach(model)


def feed(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[Transcript, list[str]]:
    """A transcript of these ids, and the pieces it gave; it must stop by itself."""
    pieces: list[str] = []
    transcript = Transcript(tokenizer, stop=stop, listener=lambda event: pieces.append(event.text))  # type: ignore[union-attr]
    for index in range(len(ids)):
        if transcript(torch.tensor([ids[: index + 1]]), None):
            break
    transcript.end()
    return transcript, pieces


def test_characters_are_never_split(byte_tokenizer: Any) -> None:
    text = "na\u00efve \u2014 \u65e5\u672c\u8a9e \U0001f41d\U0001f3fd done"
    ids = byte_tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    transcript, pieces = feed(byte_tokenizer, ids)
    assert "".join(pieces) == transcript.text == byte_tokenizer.decode(ids) == text
    assert all("\ufffd" not in piece for piece in pieces)
    cut, _ = feed(byte_tokenizer, ids[: len("na\u00efve \u2014 ".encode()) + 2])  # inside a character
    assert cut.text == "na\u00efve \u2014 \ufffd"


def test_special_tokens_leave_no_trace(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    for ids in ([1, 5, 6, 1, 7, 0, 0, 8, 1], [1], [0, 1, 5], list(range(20))):
        transcript, _ = feed(tokenizer, ids)
        assert transcript.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("ello",), "h"),
        (("o w",), "hell"),
        (("zzz", "wor", "orld"), "hello "),
        (("hello world!",), "hello world"),
        (("lloo", "lo x"), "hello world"),
        (("h",), ""),
        (("d",), "hello worl"),
        (("llo", "l"), "he"),  # the one that is complete first
        (("lo", "ello", "o"), "h"),  # at the same character: the longest
    ],
)
def test_stop_strings_and_their_beginnings(byte_tokenizer: Any, stop: tuple[str, ...], left: str) -> None:
    ids = byte_tokenizer("hello world")["input_ids"]
    transcript, pieces = feed(byte_tokenizer, ids, stop)
    assert "".join(pieces) == transcript.text == left
    assert transcript.stopped == (left != "hello world")
    if transcript.stopped:
        assert len(transcript.ids) == len(left) + min(len(one) for one in stop if "hello world".startswith(left + one))


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}])
def test_equal_to_stock(speculating: Any, make_tokenizer: Any, options: dict[str, Any]) -> None:
    """Ids and text of stock `generate`, with speculation and without; rounds add up to the text."""
    tokenizer = make_tokenizer()
    with speculating.specbound.disabled():
        torch.manual_seed(3)
        stock = speculating.generate(PROMPT, max_new_tokens=24, **options)[0, 7:].tolist()
    for speculate in (True, False):
        events: list[Any] = []
        transcript = Transcript(tokenizer, listener=events.append)
        written = write(speculating, PROMPT, transcript, seed=3, speculate=speculate, max_new_tokens=24, **options)
        assert transcript.ids == stock
        assert transcript.text == tokenizer.decode(stock, skip_special_tokens=True)
        assert [event.id for event in events if isinstance(event, Token) and event.id is not None] == stock
        assert (written.finish_reason, written.speculated) == ("length", speculate)
        assert written.stats.emitted == 24 and written.stats.seconds > 0
        rounds = [event for event in events if isinstance(event, Round)]
        assert sum(one.num_tokens for one in rounds) == (23 if speculate else 0)
        seen = 1
        for one in rounds:
            assert [one.drafts[index] for index in one.accepted] == stock[seen : seen + len(one.accepted)]
            assert len(one.drafts) == len(one.exit_layers)
            seen += one.num_tokens
        assert sum(len(one.accepted) for one in rounds) == written.stats.accepted.total()


@pytest.mark.parametrize("position", [4, 9, 17])
def test_stop_strings_end_where_stock_ends(make_model: Any, byte_tokenizer: Any, position: int) -> None:
    """The ids of stock's own `stop_strings`; the text without the stop string."""
    model = make_model(vocab_size=95)
    attach(model, SpecBound(model, FakeHeads("random", [2, 4], vocabulary=95), SpeculationBounds(0.2, 4, 4)))
    with model.specbound.disabled():
        free = model.generate(PROMPT, max_new_tokens=24, do_sample=False)[0, 7:].tolist()
        text = byte_tokenizer.decode(free)
        stop = text[position : position + 2]
        how: Any = {"stop_strings": [stop], "tokenizer": byte_tokenizer}
        found = model.generate(PROMPT, max_new_tokens=24, do_sample=False, **how)
    transcript = Transcript(byte_tokenizer, stop=[stop])
    write(model, PROMPT, transcript, max_new_tokens=24, do_sample=False)
    assert transcript.ids == found[0, 7:].tolist()
    assert len(text) == 24 and transcript.text == text.partition(stop)[0]


def test_unseeded_calls_differ(speculating: Any, make_tokenizer: Any) -> None:
    """A seeded request leaves no seed behind."""
    texts = set()
    for _ in range(3):
        write(speculating, PROMPT, Transcript(make_tokenizer()), seed=0, max_new_tokens=2, do_sample=True)
        transcript = Transcript(make_tokenizer())
        write(speculating, PROMPT, transcript, max_new_tokens=12, do_sample=True, temperature=3.0)
        texts.add(transcript.text)
    assert len(texts) > 1


@pytest.mark.parametrize("speculate", [True, False])
def test_stop_cancel_and_end_of_text(speculating: Any, plain: list[int], make_tokenizer: Any, speculate: bool) -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.decode(plain, skip_special_tokens=True)
    word = tokenizer.decode(plain[9])
    how = {"speculate": speculate, "max_new_tokens": 24, "do_sample": False}
    transcript = Transcript(tokenizer, stop=(f"{word} ",))
    written = write(speculating, PROMPT, transcript, **how)
    assert transcript.text == text[: text.index(f"{word} ")] and written.finish_reason == "stop"

    transcript = Transcript(tokenizer, listener=lambda event: len(transcript.ids) < 5 or transcript.cancelled.set())  # type: ignore[arg-type,func-returns-value]
    assert write(speculating, PROMPT, transcript, **how).finish_reason == "cancelled"
    assert transcript.ids == plain[:5]

    speculating.generation_config.eos_token_id = plain[12]
    try:
        transcript = Transcript(tokenizer)
        assert write(speculating, PROMPT, transcript, **how).finish_reason == "stop"
        assert transcript.ids == plain[: plain.index(plain[12]) + 1]
    finally:
        speculating.generation_config.eos_token_id = None
