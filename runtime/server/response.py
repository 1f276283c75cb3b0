"""`Answer`: one request from its prompts to OpenAI's response bodies, whole or streamed. Knows no routes."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from runtime.server.choice import Choice
from runtime.server.errors import ApiError, as_api_error
from runtime.server.metrics import Metrics
from runtime.server.request.prompts import Prompt
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.server.worker import Unavailable, Worker
from runtime.stats import SpeculationStats
from runtime.text.transcript import Round, Token, Written


@dataclass(slots=True)
class Answer:
    """One request at work. Its choices are written one after another: `n` to the first prompt, then to the next.

    Attributes:
        model_id: the name the model is served under.
        max_new_tokens: of the answers to each prompt.
        seconds: until it must be written; None for as long as it takes.
    """

    body: ChatRequest | CompletionRequest
    worker: Worker
    metrics: Metrics
    model_id: str
    prompts: list[Prompt]
    max_new_tokens: list[int]
    seconds: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)
    _id: str = ""
    _choices: list[Choice] = field(default_factory=list)
    _feed: AsyncGenerator[tuple[Choice, Token | Round | Written | None], None] = field(init=False)
    _told: bool = False
    _ended: bool = False

    def submit(self) -> None:
        """Into the queue, all choices or none.

        Raises:
            SpecBoundError: there is no room, or no model.
        """
        pairs = zip(self.prompts, self.max_new_tokens, strict=True)
        each = [(prompt, limit) for prompt, limit in pairs for _ in range(self.body.n)]
        self._choices = [
            Choice.of(self.body, prompt, limit, index, self.worker, self.metrics)
            for index, (prompt, limit) in enumerate(each)
        ]
        self._id = ("chatcmpl-" if self._is_chat else "cmpl-") + uuid.uuid4().hex
        self.worker.submit(*(choice.job for choice in self._choices))
        self._feed = self._events()

    def end(self, outcome: str = "cancelled") -> None:
        """Nothing more is wanted of it; the first call is counted."""
        if not self._ended:
            self._ended = True
            self.metrics.requests.labels(outcome).inc()
            self.metrics.seconds.observe(time.perf_counter() - self.started)
        for choice in self._choices:
            self.worker.cancel(choice.job)

    async def whole(self) -> dict[str, Any]:
        """The response, when all of it is there.

        Raises:
            ApiError: a call failed.
        """
        async for _ in self._feed:
            pass
        return self._envelope([self._whole(choice) for choice in self._choices], chunk=False) | self._usage()

    async def begin(self) -> bool:
        """Wait until there is something to stream; before, an error has a status of its own. Always true.

        Raises:
            ApiError: the call failed, or was not begun.
        """
        await anext(self._feed)
        return True

    async def stream(self) -> AsyncIterator[str]:
        """The response as server-sent events, after `begin`; closing it cancels the calls."""
        try:
            async for chunk in self._chunks():
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status is sent already
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            self.end()

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        show = self.body.specbound.rounds
        if (opening := self._opening(self._choices[0])) is not None:  # `begin` took what tells of it
            yield opening | usage
        async for choice, event in self._feed:
            if event is None and (opening := self._opening(choice)) is not None:
                yield opening | usage
            elif isinstance(event, Token) and (event.text or show):
                about = {"specbound": {"token": event.id}} if show else {}
                yield self._chunk(choice, {"content": event.text}) | about | usage
            elif isinstance(event, Round) and show:
                yield self._chunk(choice, {}) | {"specbound": {"round": self._describe(choice, event)}} | usage
            elif isinstance(event, Written):
                yield self._chunk(choice, {}, event.finish_reason) | usage
        if usage:
            yield self._envelope([], chunk=True) | self._usage()

    async def _events(self) -> AsyncGenerator[tuple[Choice, Token | Round | Written | None], None]:
        """Of each choice in turn: None when the first event is there, then events up to and with the last."""
        for choice in self._choices:
            event = await self._next(choice)
            choice.begin()
            yield choice, None
            while True:
                choice.take(event)
                if choice is self._choices[-1] and choice.written:
                    self.end(self._outcome())
                yield choice, event
                if choice.written:
                    break
                event = await self._next(choice)

    async def _next(self, choice: Choice) -> Token | Round | Written:
        """The next event of a choice.

        Raises:
            ApiError: it failed, or the time is over; then all of them end.
        """
        left = None if self.seconds is None else self.started + self.seconds - time.perf_counter()
        try:
            event = await asyncio.wait_for(choice.events.get(), left)
        except asyncio.TimeoutError:  # another class in Python 3.10
            said = f"not done within {self.seconds:g} s, this server's limit: ask for fewer tokens, or later"
            event = ApiError(504, said, code="timeout")
        if isinstance(event, BaseException):
            self.end({ApiError: "late", Unavailable: "refused"}.get(type(event), "failed"))
            raise as_api_error(event)
        if not self._told:
            self._told = True
            self.metrics.first_token.observe(time.perf_counter() - self.started)
        return event

    def _outcome(self) -> str:
        """How the request ended: as that choice that was ended from outside, if one was."""
        reasons = [choice.written.finish_reason for choice in self._choices if choice.written]
        return next((reason for reason in ("cancelled", "length") if reason in reasons), "stop")

    @property
    def _is_chat(self) -> bool:
        return isinstance(self.body, ChatRequest)

    def _envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._is_chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model_id, "choices": choices}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        assert choice.written is not None
        body = {"message": {"role": "assistant", "content": choice.text}} if self._is_chat else {"text": choice.text}
        reason = choice.written.finish_reason
        return {"index": choice.index, "logprobs": choice.form.take(), "finish_reason": reason} | body

    def _opening(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream has of a choice before its first token."""
        if self._is_chat:
            return self._chunk(choice, {"role": "assistant", "content": ""})
        return self._chunk(choice, {"content": choice.echo}) if choice.echo else None

    def _chunk(self, choice: Choice, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        body = {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        about = {"index": choice.index, "logprobs": choice.form.take(), "finish_reason": finish_reason}
        return self._envelope([about | body], chunk=True)

    def _describe(self, choice: Choice, one: Round) -> dict[str, Any]:
        """A round in words that a page can show: every draft's text, exit and fate."""
        tokenizer: Any = choice.job.transcript.tokenizer  # which the worker has not while it is draining
        drafts = [tokenizer.decode([token]) for token in one.drafts]
        return {
            "tokens": one.num_tokens,
            "accepted": one.accepted,
            "drafts": [
                {"text": text, "exit": exit, "parent": parent}
                for text, exit, parent in zip(drafts, one.exit_layers, one.parents, strict=True)
            ],
        }

    def _usage(self) -> dict[str, Any]:
        """Of all choices; each prompt counts once."""
        stats, speculated = SpeculationStats(), False
        for choice in self._choices:
            assert choice.written is not None
            stats += choice.written.stats
            speculated |= choice.written.speculated
        prompt = sum(one.num_tokens for one in self.prompts)
        total = {"prompt_tokens": prompt, "completion_tokens": stats.emitted, "total_tokens": prompt + stats.emitted}
        return {"usage": total | {"specbound": {"speculated": speculated} | stats.to_dict()}}
