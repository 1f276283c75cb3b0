"""Texts that go on with their prompt, of a tokenizer whose words begin with a space that a text's first one loses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.server.request.limits import Limits
from runtime.text.transcript import Transcript
from tests.helpers.servers import MODEL_ID, Served, held, stock

TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
TEXT = "w17 w60 w3"


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2 and Vicuna have it, of whole words."""
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581w{number}" for number in range(125))]
    inner = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def served(make_model: Any) -> Iterator[Served]:
    with held(make_model(), metaspace(), Limits()) as found:
        yield found


def texts(served: Served, ids: list[int]) -> tuple[str, str]:
    """Of the prompt, and of it and stock's greedy answer of 6 tokens."""
    tokenizer: Any = served.worker.tokenizer
    written = stock((None, served.model, tokenizer), ids, max_new_tokens=6, do_sample=False)
    assert not tokenizer.decode(written).startswith(" ")
    return tokenizer.decode(ids, skip_special_tokens=True), tokenizer.decode(ids + written, skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_a_completion(served: Served, echo: bool, stream: bool) -> None:
    """Prompt and answer are the whole, echoed or put together by the client."""
    tokenizer: Any = served.worker.tokenizer
    before, whole = texts(served, tokenizer(TEXT)["input_ids"])
    assert before == TEXT
    found = served.complete(prompt=TEXT, max_tokens=6, temperature=0, echo=echo, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
    assert text == (whole if echo else whole.removeprefix(TEXT)) and " w" in text[:10]


def test_where_the_answer_begins(served: Served) -> None:
    """The offset of its first token is where the prompt ends."""
    found = served.complete(prompt=TEXT, max_tokens=2, temperature=0, echo=True, logprobs=0).choices[0]
    assert found.logprobs.text_offset[:4] == [0, 3, 7, 10] and found.text[10] == " "


def test_a_message_that_is_continued(served: Served) -> None:
    """The answer begins with its space; an answer of its own does not."""
    messages: Any = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": TEXT}]
    tokenizer: Any = served.worker.tokenizer
    options = {"continue_final_message": True, "return_dict": True}
    ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    before, whole = texts(served, ids)
    arguments: Any = {"model": MODEL_ID, "messages": messages, "max_tokens": 6, "temperature": 0}
    create = served.client.chat.completions.create
    found = create(**arguments, extra_body={"continue_final_message": True}).choices[0].message.content
    assert found == whole.removeprefix(before) and found.startswith(" ")
    assert not str(create(**arguments).choices[0].message.content).startswith(" ")


def test_stop_strings_know_the_space() -> None:
    """One that begins with it is found at the beginning of a text that goes on."""
    tokenizer = metaspace()
    ids = tokenizer("w1 w2 w3")["input_ids"]
    for context, text, stopped in (([], "w3", False), (ids[:2], "", True)):
        transcript = Transcript(tokenizer, stop=[" w3"], context=context)
        transcript(torch.tensor([ids]), None)
        transcript.end()
        assert (transcript.text, transcript.stopped) == (text, stopped)
