"""What one request may ask for, and its prompt as token ids. Knows no answers and no routes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.server.schema import ApiError, ChatRequest, CompletionRequest
from runtime.server.worker import Worker
from runtime.text.encode import encode


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_tokens: of an answer.
        max_body_bytes: of a request.
        max_waiting: requests in the queue.
        seconds: from a request's arrival to its end, the queue included; None sets no limit.
    """

    max_tokens: int = 2048
    max_body_bytes: int = 1 << 20
    max_waiting: int = 16
    seconds: float | None = None


def prompt_ids(worker: Worker, body: ChatRequest | CompletionRequest) -> Tensor:
    """Token ids [1, T] of a request's prompt.

    Raises:
        ApiError: it has none, or none that the model knows.
    """
    tokenizer: Any = worker.tokenizer
    if isinstance(body, ChatRequest):
        if tokenizer.chat_template is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions", param="messages")
        messages = [message.for_template() for message in body.messages]
        try:
            ids = encode(tokenizer, messages)
        except Exception as error:  # templates raise what they like on roles that they do not take
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ApiError(400, f"the model's chat template refuses this: {first}", param="messages") from None
    elif isinstance(body.prompt, str):
        ids = tokenizer(body.prompt)["input_ids"]
    elif body.prompt and isinstance(body.prompt[0], str):
        ids = tokenizer(body.prompt[0])["input_ids"]
    else:
        ids = [token for token in body.prompt if isinstance(token, int)]
    known = worker.model.get_input_embeddings().weight.shape[0]
    if not ids or not all(0 <= token < known for token in ids):
        raise ApiError(400, f"the prompt must be at least one token, each from 0 to {known - 1}", param="prompt")
    return torch.tensor([ids])


def token_limit(body: ChatRequest | CompletionRequest, prompt_tokens: int, context: int, limits: Limits) -> int:
    """Tokens to generate at most.

    Raises:
        ApiError: more are asked for than fit or are allowed.
    """
    room = context - prompt_tokens
    asked = body.limit
    if room < (asked or 1):
        raise ApiError(
            400,
            f"this model's context is {context} tokens: {prompt_tokens} of the prompt and {asked or 1} of the answer"
            " do not fit",
            code="context_length_exceeded",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
        )
    if (asked or 0) > limits.max_tokens:
        raise ApiError(
            400, f"max_tokens is {asked}: this server takes at most {limits.max_tokens}", param="max_tokens"
        )
    return asked or min(room, limits.max_tokens)
