"""A server of a tiny model that speculates, and the `openai` client of it."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.servers import TEMPLATE, running


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[tuple[str, Any, Any]]:
    """Address, model and tokenizer; drafts come at random, so most are wrong and some are right."""
    model, tokenizer = make_model(max_position_embeddings=256), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    attach(model, SpecBound(model, FakeHeads("random", [2, 4], vocabulary=3), SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, tokenizer)) as (url, _):
        yield url, model, tokenizer


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[openai.OpenAI]:
    """The real client, which tries once."""
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
