"""What bodies say without changing anything is taken, at every route; what is not takes one plain sentence."""

from typing import Any

import pytest
from pydantic import ValidationError

from runtime.server.errors import ApiError, first_of
from runtime.server.request.responses import ResponsesRequest
from runtime.server.request.schema import ChatRequest, CompletionRequest

USER: dict[str, Any] = {"role": "user", "content": "w1"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "w1"}
ASKED: dict[str, Any] = {"model": "m", "input": "w1"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "g"}}


def said(kind: Any, body: dict[str, Any]) -> str:
    """What a client is told of a body; empty where it is taken."""
    try:
        found = kind.model_validate(body)
        if kind is ResponsesRequest:
            found.as_chat()
    except ApiError as error:
        return str(error)
    except ValidationError as error:
        return str(first_of(error.errors(), ()))
    return ""


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ResponsesRequest])
@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": {"include_obfuscation": False}},
        {"n": 1},
        {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {}},
        {"ignore_eos": False, "min_tokens": 0, "stop_token_ids": []},
        {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {
            "return_token_ids": False,
            "return_tokens_as_token_ids": False,
            "include_reasoning": True,
            "detokenize": True,
        },
        {"include": ["reasoning.encrypted_content"]},
        {"context_management": [], "metadata": {"a": "b"}, "parallel_tool_calls": False},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(kind: Any, fields: dict[str, Any]) -> None:
    base = {ChatRequest: CHAT, CompletionRequest: TEXT, ResponsesRequest: ASKED}[kind]
    assert said(kind, base | fields) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"parsed": {"a": 1}},
        {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}}]},
        {"tool_calls": [TOOL | {"function": {"name": "f", "arguments": "{}"}, "provider_specific_fields": {}}]},
        {"thinking_blocks": [], "images": [], "prefix": False, "reasoning_details": []},
        {"phase": "final_answer"},
    ],
    ids=str,
)
def test_answers_go_back_as_clients_hold_them(fields: dict[str, Any]) -> None:
    """Those of the SDK's `parse` and of litellm too."""
    assert said(ChatRequest, CHAT | {"messages": [USER, {"role": "assistant", "content": "{}"} | fields, USER]}) == ""


def test_parsed_responses_go_back() -> None:
    part = {"type": "output_text", "text": "{}", "annotations": [], "logprobs": [], "parsed": {"a": 1}}
    item = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}
    assert said(ResponsesRequest, ASKED | {"input": [item, USER]}) == ""


def test_responses_honour_what_chats_do() -> None:
    """Field by field, and an effort of none."""
    fields = {"stop_token_ids": [5], "min_tokens": 2, "ignore_eos": True, "logit_bias": {"5": 1}, "min_p": 0.1}
    fields |= {"presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "temperature": 0.5}
    chat = ResponsesRequest.model_validate(ASKED | fields | {"reasoning": {"effort": "none"}}).as_chat()
    expected = ChatRequest.model_validate(CHAT | fields | {"reasoning_effort": "none"})
    assert chat == expected and chat.template_variables == {"enable_thinking": False}


def test_no_limit() -> None:
    """-1, as llama.cpp has it, also where a completion has 16 tokens by default."""
    assert ChatRequest.model_validate(CHAT | {"max_tokens": -1}).limit is None
    assert CompletionRequest.model_validate(TEXT | {"max_tokens": -1}).limit is None
    assert CompletionRequest.model_validate(TEXT).limit == 16


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_some_of_the_tools(mode: str) -> None:
    """The template is told of those, and those may be called."""
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [OTHER]}}
    tools = [TOOL | {"cache_control": {"type": "ephemeral"}}, OTHER | {"defer_loading": False}]
    body = ChatRequest.model_validate(CHAT | {"tools": tools, "tool_choice": choice})
    assert [tool.function.name for tool in body.called] == ["g"] and body.must_call == (mode == "required")
    assert body.tools_of_template == [OTHER]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": "json_object"}, "response_format: must be an object"),
        ({"response_format": {"type": "regex"}}, "response_format.type: must be text, json_object or json_schema"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0: a tool of type custom is not supported"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools.0: defer_loading is not supported"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0: content is missing: give text, or a list of"),
        ({"messages": [USER | {"prefix": True}]}, "messages.0: prefix is not supported by this server: leave it out"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported by this server but for none"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "exclude each other"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, or -1"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids: must have at most 64 items"),
        ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "tools.0.function.name: must match pattern"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "allowed_tools must give a mode"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}}},
            "what is not among the tools",
        ),
    ],
    ids=str,
)
def test_what_is_refused_in_plain_words(fields: dict[str, Any], expected: str) -> None:
    assert expected in said(ChatRequest, CHAT | fields)
