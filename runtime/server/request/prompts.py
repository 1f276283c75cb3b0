"""`Prompt`: a request's prompts as token ids. Knows no answers and no routes."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.server.dialect import TEXT, Dialect
from runtime.server.errors import ApiError
from runtime.server.grammar import Grammar, grammar_of
from runtime.server.request.messages import Conversation
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.server.request.tokenize import TokenizeRequest
from runtime.server.worker import Worker
from runtime.text.encode import encode


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: shape [1, T], int64.
        text: as it is echoed; empty for a chat.
        dialect: how the model writes what is not text.
        opening: what of the answer the prompt holds already.
        grammar: what binds the answer.
    """

    ids: Tensor
    text: str
    dialect: Dialect = TEXT
    opening: str = ""
    grammar: Grammar | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[1]


def prompts_of(worker: Worker, body: ChatRequest | CompletionRequest) -> list[Prompt]:
    """All prompts of a request.

    Raises:
        ApiError: one has no token, or one that the model does not know.
    """
    tokenizer: Any = worker.tokenizer
    if isinstance(body, ChatRequest):
        return [_chat_prompt(worker.model, tokenizer, body)]
    special = {"add_special_tokens": body.add_special_tokens}
    pairs = [
        (tokenizer(one, **special)["input_ids"], one) if isinstance(one, str) else (one, None) for one in body.prompt
    ]
    for ids, _ in pairs:
        _check_ids(worker.model, ids, "prompt")
    return [Prompt(torch.tensor([ids]), tokenizer.decode(ids) if text is None else text) for ids, text in pairs]


def _chat_prompt(model: Any, tokenizer: Any, body: ChatRequest) -> Prompt:
    """That of a chat, and what its answer is to be."""
    ids = chat_ids(tokenizer, body)
    _check_ids(model, ids, "messages")
    dialect = Dialect.of(tokenizer, tools=bool(body.tools))
    if body.called and dialect.calls is None and dialect.own is None:
        said = "tools: the form in which this model calls them is not known to this server: leave them out"
        raise ApiError(400, said, param="tools")
    opening = dialect.opening(tokenizer, ids, body.messages[-1].content if body.continue_final_message else None)
    grammar = grammar_of(model, tokenizer, body, dialect, opening)
    return Prompt(torch.tensor([ids]), "", dialect, opening, grammar)


def _check_ids(model: Any, ids: list[int], param: str) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    if not ids or not all(0 <= token < known for token in ids):
        raise ApiError(400, f"the prompt must be at least one token, each from 0 to {known - 1}", param=param)


def chat_ids(tokenizer: Any, chat: Conversation) -> list[int]:
    """Token ids of a conversation in the chat template.

    Raises:
        ApiError: the model has no template, or it refuses the conversation, or has no place for tools or calls.
    """
    if tokenizer.chat_template is None:
        raise ApiError(400, "this model has no chat template: use /v1/completions", param="messages")
    if (
        chat.reasoning_effort
        and Dialect.of(tokenizer).thinks
        and "enable_thinking" not in tokenizer.get_chat_template()
    ):
        said = "reasoning_effort: this model's thinking cannot be switched off: leave it out"
        raise ApiError(400, said, param="reasoning_effort")
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) & set(chat.template_variables)
    if ours:  # `tools`, `chat_template`, ...: arguments of the call, not variables
        said = f"chat_template_kwargs: {min(ours)} is not a variable of the template: leave it out"
        raise ApiError(400, said, param="chat_template_kwargs")
    tools = chat.tools_of_template
    if tools and not Dialect.of(tokenizer, tools=True).takes_tools:
        raise ApiError(400, "tools: this model's chat template has no place for them: leave them out", param="tools")
    messages = [message.for_template() for message in chat.messages]
    options = chat.template_variables | chat.template_options | ({"tools": tools} if tools else {})
    try:
        ids = encode(tokenizer, messages, options=options)
    except Exception as error:  # templates raise what they like on roles that they do not take
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ApiError(400, f"the model's chat template refuses this: {first}", param="messages") from None
    if any("tool_calls" in each for each in messages):
        _check_called(tokenizer, messages, options, ids)
    return ids


def _check_called(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any], ids: list[int]) -> None:
    """Whether the template tells the calls that the assistant made.

    Raises:
        ApiError: the ids are the same without them.
    """
    silent = [{key: value for key, value in each.items() if key != "tool_calls"} for each in messages]
    try:
        same = encode(tokenizer, silent, options=options) == ids
    except Exception:  # it needs them
        return
    if same:
        said = "messages: this model's chat template has no place for tool_calls: leave them out"
        raise ApiError(400, said, param="messages")


def detokenized(worker: Worker, ids: list[int]) -> str:
    """The text of token ids, special ones included.

    Raises:
        ApiError: the model does not know one.
    """
    _check_ids(worker.model, ids, "tokens")
    return str(worker.tokenizer.decode(ids))


def tokenized(worker: Worker, body: TokenizeRequest) -> dict[str, Any]:
    """What /tokenize answers.

    Raises:
        ApiError: as `chat_ids`.
    """
    tokenizer: Any = worker.tokenizer
    if body.prompt is None:
        ids = chat_ids(tokenizer, body)
    else:
        ids = tokenizer(body.prompt, add_special_tokens=body.add_special_tokens is not False)["input_ids"]
    return {
        "count": len(ids),
        "max_model_len": int(worker.model.config.get_text_config().max_position_embeddings),
        "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
    }
