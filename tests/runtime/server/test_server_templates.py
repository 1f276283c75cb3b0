"""Chats and their template: its variables, messages that are continued, and /tokenize."""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from runtime import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.servers import MODEL_ID, following, running, stock

# Reads what clients may hand it.
TEMPLATE = (
    "{% for message in messages %}{{ message.name or message.role }} {{ message.reasoning_content or '' }} "
    "{{ message.content }} {% endfor %}{% if enable_thinking %}w7 {% endif %}{{ style or '' }} {{ template or '' }} "
    "{% if add_generation_prompt %}w8 {% endif %}"
)
CHAT: Any = [{"role": "user", "content": "w17 w60 w3"}]


@pytest.fixture(scope="module")
def served(make_model: Any, make_tokenizer: Any) -> Iterator[tuple[str, Any, Any]]:
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    attach(model, SpecBound(model, FakeHeads("random", [2, 4], vocabulary=128), SpeculationBounds(0.2, 4, 4)))
    model.specbound.prepare(model)
    with running(lambda: (model, tokenizer)) as (url, _):
        yield url, model, tokenizer


CASES: list[tuple[dict[str, Any], list[Any], dict[str, Any]]] = [
    ({}, CHAT, {"add_generation_prompt": True}),
    ({"add_generation_prompt": False}, CHAT, {}),
    ({"enable_thinking": True}, CHAT, {"add_generation_prompt": True, "enable_thinking": True}),
    ({"chat_template_kwargs": {"enable_thinking": True, "style": "w9", "template": "w3"}}, CHAT,
     {"add_generation_prompt": True, "enable_thinking": True, "style": "w9", "template": "w3"}),
    ({"continue_final_message": True}, [*CHAT, {"role": "assistant", "content": "w5 w6"}],
     {"continue_final_message": True}),
    ({"continue_final_message": True, "add_generation_prompt": False},
     [*CHAT, {"role": "assistant", "content": "w5 w6"}], {"continue_final_message": True}),
    ({}, [{"role": "user", "name": "w30", "content": "w1"}], {"add_generation_prompt": True}),
    ({}, [{"role": "assistant", "reasoning_content": "w31", "content": "w1"}, *CHAT], {"add_generation_prompt": True}),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "messages", "options"), CASES)
def test_chats_are_those_of_the_template(
    served: Any, asked: dict[str, Any], messages: Any, options: dict[str, Any]
) -> None:
    """The text is stock's after the ids that transformers makes of the same, and /tokenize tells those ids."""
    url, _, tokenizer = served
    ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    goes_on = ids if asked.get("continue_final_message") else []
    expected = following(tokenizer, goes_on, stock(served, ids, max_new_tokens=10, do_sample=False))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        found = client.chat.completions.create(
            model=MODEL_ID, messages=messages, max_tokens=10, temperature=0, extra_body=asked
        )
    assert found.choices[0].message.content == expected
    told = post(url, {"messages": messages} | asked)
    assert (told["tokens"], told["count"], told["max_model_len"]) == (ids, len(ids), 512)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template is not a variable of the template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize is not a variable of the template"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "needs a last message of the assistant"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
    ],
)
def test_what_the_template_is_not_asked(served: Any, asked: dict[str, Any], said: str) -> None:
    with (
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match=said),
    ):
        client.chat.completions.create(model=MODEL_ID, messages=CHAT, extra_body=asked)


def post(url: str, body: dict[str, Any]) -> Any:
    """What /tokenize answers, errors too."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/tokenize", json.dumps(body).encode(), headers)
    try:
        return json.loads(urllib.request.urlopen(request).read())
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


def test_tokenize(served: Any) -> None:
    """A text, with the tokens' own names if they are wanted."""
    url = served[0]
    told = {"count": 2, "max_model_len": 512, "tokens": [4, 5]}
    assert post(url, {"prompt": "w1 w2"}) == told | {"token_strs": None}
    strings = post(url, {"model": MODEL_ID, "prompt": "w1 w2", "return_token_strs": True, "add_special_tokens": False})
    assert strings == told | {"token_strs": ["w1", "w2"]}
    assert post(url, {"prompt": ""})["tokens"] == []
    for body in ({}, {"prompt": "w1", "messages": CHAT}):
        assert "either a prompt or messages" in post(url, body)["error"]["message"]
    assert "add_special_tokens" in post(url, {"messages": CHAT, "add_special_tokens": True})["error"]["message"]
    assert "'tiny' only" in post(url, {"model": "other", "prompt": "w1"})["error"]["message"]
