"""`Answer`: one request from its prompts to its response, whole or streamed. Knows no routes."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtime.server.answer.choice import Choice, Event
from runtime.server.answer.reader import Delta
from runtime.server.errors import ApiError, as_api_error
from runtime.server.metrics import Metrics
from runtime.server.request.prompts import Prompt
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.server.worker import Unavailable, Worker
from runtime.stats import SpeculationStats
from runtime.text.transcript import Round, Token, Written


class Form(Protocol):
    """How an answer looks to its client: `Chunks` or `Items`.

    Attributes:
        last: what a stream ends with.
    """

    last: str

    def line(self, event: dict[str, Any]) -> str:
        """An event of a stream, as it is sent."""

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The response, when all of it is there."""

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """What a stream has of a choice before its first token."""

    def part(self, choice: Choice, deltas: Sequence[Delta], about: dict[str, Any]) -> list[dict[str, Any]]:
        """What is new of a choice, and fields of our own beside it."""

    def closing(self, choice: Choice) -> list[dict[str, Any]]:
        """The end of a choice."""

    def end(self, choices: Sequence[Choice], usage: dict[str, Any]) -> list[dict[str, Any]]:
        """The end of all."""

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """What goes wrong when the status is sent already."""


@dataclass(slots=True)
class Answer:
    """One request at work. Its choices are `n` to the first prompt, then to the next, and told as they come.

    Attributes:
        form: what its client reads.
        max_new_tokens: of the answers to each prompt.
        seconds: until it must be written; None for as long as it takes.
    """

    body: ChatRequest | CompletionRequest
    worker: Worker
    metrics: Metrics
    form: Form
    prompts: list[Prompt]
    max_new_tokens: list[int]
    seconds: float | None = None
    started: float = field(default_factory=time.perf_counter)
    _choices: list[Choice] = field(default_factory=list)
    _told_of: "asyncio.Queue[tuple[int, Event]]" = field(default_factory=asyncio.Queue)
    _feed: AsyncGenerator[tuple[Choice, Token | Round | Written | None], None] = field(init=False)
    _first: Choice | None = None
    _ended: bool = False

    def submit(self) -> None:
        """Into the queue.

        Raises:
            SpecBoundError: there is no room, or no model.
        """
        pairs = zip(self.prompts, self.max_new_tokens, strict=True)
        each = [(prompt, limit) for prompt, limit in pairs for _ in range(self.body.n)]
        self._choices = [
            Choice.of(self.body, prompt, limit, index, self.worker, self.metrics, self._told_of)
            for index, (prompt, limit) in enumerate(each)
        ]
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
        return self.form.whole(self._choices, self._usage())

    async def begin(self) -> bool:
        """Wait until there is something to stream; before, an error has a status of its own. Always true.

        Raises:
            ApiError: the call failed, or was not begun.
        """
        await anext(self._feed)
        return True

    async def stream(self) -> AsyncIterator[str]:
        """The response as server-sent events, after `begin`; closing it cancels the calls."""
        assert self._first is not None
        try:
            for event in self.form.opening(self._first):  # `begin` took what tells of it
                yield self.form.line(event)
            async for choice, told in self._feed:
                for event in self._parts_of(choice, told):
                    yield self.form.line(event)
            for event in self.form.end(self._choices, self._usage()):
                yield self.form.line(event)
            yield self.form.last
        except ApiError as error:  # the status is sent already
            yield self.form.line(self.form.failure(error.body()))
        finally:
            self.end()

    def _parts_of(self, choice: Choice, told: Token | Round | Written | None) -> list[dict[str, Any]]:
        """What a stream has of something that happened to a choice."""
        show = self.body.specbound.rounds
        if told is None:
            return self.form.opening(choice)
        about: dict[str, Any] = {}
        if show and isinstance(told, Round):
            about = {"specbound": {"round": self._describe(choice, told)}}
        elif show and isinstance(told, Token):
            about = {"specbound": {"token": told.id}}
        parts = self.form.part(choice, choice.take_deltas(), about)
        return parts + self.form.closing(choice) if isinstance(told, Written) else parts

    async def _events(self) -> AsyncGenerator[tuple[Choice, Token | Round | Written | None], None]:
        """Of all choices, as they come: None when the first of one is there, then those up to and with its last."""
        begun: set[int] = set()
        left = len(self._choices)
        while left:
            choice, event = await self._next()
            if choice.index not in begun:
                begun.add(choice.index)
                choice.begin()
                self._first = self._first or choice
                yield choice, None
            choice.take(event)
            left -= choice.written is not None
            if not left:
                self.end(self._outcome())
            yield choice, event

    async def _next(self) -> tuple[Choice, Token | Round | Written]:
        """The next event of any choice.

        Raises:
            ApiError: it failed, or the time is over; then all of them end.
        """
        left = None if self.seconds is None else self.started + self.seconds - time.perf_counter()
        try:
            index, event = await asyncio.wait_for(self._told_of.get(), left)
        except asyncio.TimeoutError:  # another class in Python 3.10
            said = f"not done within {self.seconds:g} s, this server's limit: ask for fewer tokens, or later"
            index, event = 0, ApiError(504, said, code="timeout")
        if isinstance(event, BaseException):
            self.end({ApiError: "late", Unavailable: "refused"}.get(type(event), "failed"))
            raise as_api_error(event)
        if self._first is None:
            self.metrics.first_token.observe(time.perf_counter() - self.started)
        return self._choices[index], event

    def _outcome(self) -> str:
        """How the request ended: as that choice that was ended from outside, if one was."""
        reasons = [choice.written.finish_reason for choice in self._choices if choice.written]
        return next((reason for reason in ("cancelled", "length") if reason in reasons), "stop")

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
        """Tokens of all choices; each prompt counts once, and what was read for another answer by its first choice."""
        stats, speculated, cached = SpeculationStats(), False, 0
        for choice in self._choices:
            assert choice.written is not None
            stats += choice.written.stats
            speculated |= choice.written.speculated
            cached += choice.written.stats.reused if choice.index % self.body.n == 0 else 0
        prompt = sum(one.num_tokens for one in self.prompts)
        reasoning = sum(choice.num_reasoning for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": stats.emitted,
            "total_tokens": prompt + stats.emitted,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
            "specbound": {"speculated": speculated} | stats.to_dict(),
        }
