"""`Answer`: one request from its prompt to OpenAI's response bodies, whole or streamed. Knows no routes."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from runtime.server.metrics import Metrics
from runtime.server.schema import ApiError, ChatRequest, CompletionRequest
from runtime.server.top_logprobs import LogprobsForm
from runtime.server.worker import Full, Job, Unavailable, Worker
from runtime.text.transcript import Round, Token, Transcript, Written


@dataclass(slots=True)
class Answer:
    """One request at work.

    Attributes:
        model_id: the name the model is served under.
        prompt: token ids, shape [1, T].
        max_new_tokens: of the answer.
        seconds: until it must be written; None for as long as it takes.
    """

    body: ChatRequest | CompletionRequest
    worker: Worker
    metrics: Metrics
    model_id: str
    prompt: Tensor
    max_new_tokens: int
    seconds: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)
    _events: "asyncio.Queue[Token | Round | Written | BaseException]" = field(default_factory=asyncio.Queue)
    _id: str = ""
    _job: Job | None = None
    _logprobs: LogprobsForm = field(init=False)

    def submit(self) -> None:
        """Into the queue.

        Raises:
            ApiError: there is no room, or no model.
        """
        loop = asyncio.get_running_loop()

        def tell(event: Token | Round | Written | BaseException) -> None:
            with suppress(RuntimeError):  # nobody listens any more: the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        transcript = Transcript(
            self.worker.tokenizer, stop=self.body.stop_strings, num_logprobs=self.body.num_logprobs, listener=tell
        )
        self._logprobs = LogprobsForm(self.worker.tokenizer, chat=self._is_chat)
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + uuid.uuid4().hex
        options = self.body.sampling() | {"max_new_tokens": self.max_new_tokens}
        prompt = self.prompt.to(self.worker.model.device)
        self._job = Job(prompt, transcript, options, self.body.seed, self.body.specbound.enabled, tell)
        try:
            self.worker.submit(self._job)
        except (Full, Unavailable) as error:
            self.metrics.requests.labels("refused").inc()
            raise as_api_error(error) from None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        assert self._job is not None
        self.worker.cancel(self._job)

    async def whole(self) -> dict[str, Any]:
        """The response, when all of it is there.

        Raises:
            ApiError: the call failed.
        """
        assert self._job is not None
        written = None
        async for event in self._until_written():
            written = event
        assert isinstance(written, Written)
        logprobs = self._logprobs.take()
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": written.finish_reason}
        text = self._job.transcript.text
        choice |= {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return self._envelope([choice], chunk=False) | {"usage": self._usage(written)}

    async def stream(self) -> AsyncIterator[str]:
        """The response as server-sent events; closing it cancels the call."""
        try:
            async for chunk in self._chunks():
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status is sent already
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            self.cancel()

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        if self._is_chat:
            yield self._chunk({"role": "assistant", "content": ""}) | usage
        show = self.body.specbound.rounds
        async for event in self._until_written():
            if isinstance(event, Token) and (event.text or show):
                about = {"specbound": {"token": event.id}} if show else {}
                yield self._chunk({"content": event.text}) | about | usage
            elif isinstance(event, Round) and show:
                yield self._chunk({}) | {"specbound": {"round": self._describe(event)}} | usage
            elif isinstance(event, Written):
                yield self._chunk({}, event.finish_reason) | usage
                if usage:
                    yield self._envelope([], chunk=True) | {"usage": self._usage(event)}

    async def _until_written(self) -> AsyncIterator[Token | Round | Written]:
        """Events up to and with the last; counts them."""
        outcome, waiting_for_first = "cancelled", True
        try:
            while True:
                event = await self._next()
                if isinstance(event, BaseException):
                    outcome = {ApiError: "late", Unavailable: "refused"}.get(type(event), "failed")
                    raise as_api_error(event)
                if waiting_for_first:
                    self.metrics.first_token.observe(time.perf_counter() - self.started)
                    waiting_for_first = False
                if isinstance(event, Written):
                    outcome = event.finish_reason
                    self.metrics.record(self.prompt.shape[1], event.stats)
                if isinstance(event, Token):
                    self._logprobs.add(event)
                yield event
                if isinstance(event, Written):
                    return
        finally:
            self.metrics.requests.labels(outcome).inc()
            self.metrics.seconds.observe(time.perf_counter() - self.started)

    async def _next(self) -> Token | Round | Written | BaseException:
        """The next event, or the end of the time."""
        left = None if self.seconds is None else self.started + self.seconds - time.perf_counter()
        try:
            return await asyncio.wait_for(self._events.get(), left)
        except asyncio.TimeoutError:  # another class in Python 3.10
            self.cancel()
            said = f"not done within {self.seconds:g} s, this server's limit: ask for fewer tokens, or later"
            return ApiError(504, said, code="timeout")

    @property
    def _is_chat(self) -> bool:
        return isinstance(self.body, ChatRequest)

    def _envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._is_chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model_id, "choices": choices}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs.take(), "finish_reason": finish_reason}
        choice |= {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        return self._envelope([choice], chunk=True)

    def _describe(self, one: Round) -> dict[str, Any]:
        """A round in words that a page can show: every draft's text, exit and fate."""
        tokenizer: Any = self._job.transcript.tokenizer if self._job else None
        drafts = [tokenizer.decode([token]) for token in one.drafts]
        return {
            "tokens": one.num_tokens,
            "accepted": one.accepted,
            "drafts": [
                {"text": text, "exit": exit, "parent": parent}
                for text, exit, parent in zip(drafts, one.exit_layers, one.parents, strict=True)
            ],
        }

    def _usage(self, written: Written) -> dict[str, Any]:
        prompt, answer = self.prompt.shape[1], written.stats.emitted
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "specbound": {"speculated": written.speculated} | written.stats.to_dict(),
        }


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of it: nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", retry_after=5)
    return ApiError(500, f"the request failed ({type(error).__name__}); others are not affected", code="failed")
