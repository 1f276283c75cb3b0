"""`Limits`: what one request may ask for. Knows no answers and no routes."""

from dataclasses import dataclass

from runtime.server.errors import ApiError
from runtime.server.request.schema import ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_tokens: of an answer; None for as many as the context has room for.
        max_body_bytes: of a request.
        max_waiting: requests in the queue.
        max_answers: of one request, to all of its prompts.
        max_running: answers that are made together; None for what memory has room for.
        seconds: from a request's arrival to its end, the queue included; None sets no limit.
    """

    max_tokens: int | None = None
    max_body_bytes: int = 1 << 20
    max_waiting: int = 16
    max_running: int | None = 8
    seconds: float | None = None
    max_answers: int = 1024

    def tokens(self, body: ChatRequest | CompletionRequest, prompt_tokens: int, context: int) -> int:
        """Tokens to generate at most.

        Raises:
            ApiError: more are asked for than fit or are allowed.
        """
        room, asked = context - prompt_tokens, body.limit
        wanted = 1 if asked is None else asked
        if room < wanted:
            raise ApiError(
                400,
                f"this model's context is {context} tokens: {prompt_tokens} of the prompt and {wanted} of the answer"
                " do not fit",
                code="context_length_exceeded",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
            )
        most = room if self.max_tokens is None else min(room, self.max_tokens)
        if wanted > most:
            said = f"max_tokens is {asked}: this server takes at most {self.max_tokens}"
            raise ApiError(400, said, param="max_tokens")
        limit = most if asked is None else asked
        if body.min_tokens > limit:
            said = f"min_tokens is {body.min_tokens}: the answer has at most {limit} tokens"
            raise ApiError(400, said, param="min_tokens")
        return limit

    def check_answers(self, prompts: int, n: int) -> None:
        """Whether a request may have `n` answers to each of its prompts.

        Raises:
            ApiError: there are too many.
        """
        if prompts * n > self.max_answers:
            said = f"{n} answers to each of {prompts} prompts: this server takes at most {self.max_answers} answers"
            raise ApiError(400, f"{said} in one request, send several", param="prompt" if prompts > 1 else "n")


def check_ids(body: ChatRequest | CompletionRequest, num_ids: int) -> None:
    """Whether the model has all ids of `logit_bias` and `stop_token_ids`.

    Raises:
        ApiError: it does not.
    """
    for param, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        wrong = [id for id in ids if int(id) >= num_ids]
        if wrong:
            said = f"{param}: {wrong[0]!s:.20} is no token id: they end at {num_ids - 1}"
            raise ApiError(400, said, param=param)
