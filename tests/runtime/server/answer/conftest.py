"""A server of a tiny model that writes letters, whose drafts a test can choose."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.servers import running

# A place for tools, and calls as Hermes and Qwen have them.
TEMPLATE = (
    '{% if tools %}{{ tools | tojson }} Call as <tool_call>{"name": ...}</tool_call>{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def letter_tokenizer(special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """`<pad> </s>`, a token for each character of ASCII that is seen, space and line feed, then special ones."""
    words = ["<pad>", "</s>", "\u0120", "\u010a", *map(chr, range(0x21, 0x7F))]  # space and line feed as BPE has them
    inner = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_letter_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_letter_tokenizer(special=())`: a token for each character, and special ones."""
    return letter_tokenizer


@pytest.fixture(scope="module")
def heads() -> FakeHeads:
    """The served model's: a test gives them the truth, of which they draft two thirds."""
    return FakeHeads("mixed", [2, 4])


@pytest.fixture(scope="module")
def served(make_model: Any, heads: FakeHeads) -> Iterator[tuple[str, Any, Any]]:
    """Address, model and tokenizer."""
    tokenizer = letter_tokenizer()
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=1)
    tokenizer.chat_template = TEMPLATE
    attach(model, SpecBound(model, heads, SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, tokenizer)) as (url, _):
        yield url, model, tokenizer


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[openai.OpenAI]:
    """The real client, which tries once."""
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
