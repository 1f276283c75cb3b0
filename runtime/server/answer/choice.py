"""`Choice`: one of the answers to a request: its job, and what came of it so far. Knows no response bodies."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from runtime.server.answer.reader import Delta, Reader
from runtime.server.answer.top_logprobs import LogprobsForm
from runtime.server.grammar import GrammarMask
from runtime.server.job import Job
from runtime.server.metrics import Metrics
from runtime.server.penalties import CountPenalties
from runtime.server.request.prompts import Prompt
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.server.worker import Worker
from runtime.text.transcript import Round, Token, Transcript, Written, ends_of

Event = Token | Round | Written | BaseException
CONTEXT = 8  # tokens of the prompt that an answer which continues it is decoded with
NO_TOKEN = 2**31 - 1  # in no vocabulary: transformers takes an empty list of ends for none told


@dataclass(slots=True)
class Choice:
    """One call of `generate`, from the queue to its end.

    Attributes:
        index: among the choices of its request.
        echo: text that comes before the answer's own.
        form: the tokens' probabilities.
        reader: what of its text is content, reasoning and calls.
        deltas: what the reader found and nobody has taken yet.
        num_tokens: of the answer so far.
        num_reasoning: those of its reasoning, marks included.
        num_held: the last of them, of which nothing could be told yet.
        written: what came of it.
    """

    index: int
    prompt: Prompt
    echo: str
    job: Job
    form: LogprobsForm
    reader: Reader
    deltas: list[Delta] = field(default_factory=list)
    num_tokens: int = 0
    num_reasoning: int = 0
    num_held: int = 0
    written: Written | None = None

    @classmethod
    def of(
        cls,
        body: ChatRequest | CompletionRequest,
        prompt: Prompt,
        max_new_tokens: int,
        index: int,
        worker: Worker,
        metrics: Metrics,
        events: "asyncio.Queue[tuple[int, Event]]",
    ) -> "Choice":
        """The choice of that index, not in the queue yet; `events` is told what happens to it, with the index."""
        loop = asyncio.get_running_loop()
        told: list[float] = []  # when the last token came

        def tell(event: Event) -> None:
            if isinstance(event, Token) and event.id is not None:
                told.append(time.perf_counter())
                if len(told) > 1:
                    metrics.between.observe(told[-1] - told.pop(0))
            with suppress(RuntimeError):  # nobody listens any more: the server has ended
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        def finish(outcome: Written | BaseException) -> None:
            if isinstance(outcome, Written):  # also where nobody waits for it any more
                metrics.record(prompt.num_tokens, outcome.stats)
            tell(outcome)

        ends = body.ends(ends_of(worker.model))
        options = body.sampling() | {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends) or [NO_TOKEN]}
        seed = None if body.seed is None else body.seed + index % body.n
        reader, hidden = _reader(body, prompt, worker.tokenizer)
        transcript = Transcript(
            worker.tokenizer,
            stop=body.stop,
            num_logprobs=body.num_logprobs,
            listener=tell,
            hidden=hidden,
            ends=ends,
            context=prompt.ids[0, -CONTEXT:].tolist() if _continues(body) else [],
        )
        job = Job(prompt.ids.to(worker.model.device), transcript, options, seed, body.specbound.enabled, finish)
        if body.presence_penalty or body.frequency_penalty:
            presence, frequency = body.presence_penalty, body.frequency_penalty
            job.processors.append(CountPenalties(prompt.num_tokens, presence=presence, frequency=frequency))
        if prompt.grammar is not None:
            job.processors.append(GrammarMask(prompt.grammar, prompt.num_tokens))
        if body.echo:
            job.num_prompt_logprobs = body.num_logprobs
        form = LogprobsForm(worker.tokenizer, chat=isinstance(body, ChatRequest))
        return cls(index, prompt, prompt.text if body.echo else "", job, form, reader)

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended, in OpenAI's words."""
        if self.written is None:
            return None
        called = self.reader.calls and self.written.finish_reason == "stop"
        return "tool_calls" if called else self.written.finish_reason

    def begin(self) -> None:
        """The first event has come, none is taken yet; the prompt's probabilities are there, if they were wanted."""
        if self.job.num_prompt_logprobs is not None:
            pieces: list[Token | Round] = []
            reader = Transcript(self.job.transcript.tokenizer, listener=pieces.append)
            for token in self.prompt.ids[0]:
                reader(token[None, None], None)
            self.form.add_prompt([each for each in pieces if isinstance(each, Token)], self.job.prompt_logprobs)
        self.form.shown = len(self.echo)

    def take(self, event: Event) -> None:
        """Keep what an event tells."""
        if isinstance(event, Token):
            self.num_tokens += event.id is not None
            self.form.add(event)
            thinking, deltas = self.reader.thinking, self.reader.feed(event.text)
            self.deltas += deltas
            self._count(event, thinking or self.reader.thinking, told=bool(deltas))
        elif isinstance(event, Written):
            self.deltas += self.reader.finish()
            self.written = event

    def _count(self, token: Token, thinking: bool, *, told: bool) -> None:
        """Whether a token is of the reasoning, and with it those before that may have been its mark."""
        if token.id is None:
            return
        self.num_held += 1
        if thinking:
            self.num_reasoning += self.num_held
        if thinking or told:
            self.num_held = 0

    def take_deltas(self) -> list[Delta]:
        """What is new since the last call."""
        deltas, self.deltas = self.deltas, []
        return deltas


def _continues(body: ChatRequest | CompletionRequest) -> bool:
    """Whether the answer's text goes on with the prompt's."""
    return not isinstance(body, ChatRequest) or body.continue_final_message


def _reader(body: ChatRequest | CompletionRequest, prompt: Prompt, tokenizer: Any) -> tuple[Reader, set[int] | None]:
    """What reads an answer, and the ids that are no text of it; None where those are all special ones."""
    if not isinstance(body, ChatRequest):
        return Reader(prompt.dialect), None
    tools = [tool.for_template() for tool in body.called]
    reader = Reader(prompt.dialect, prompt.opening, tools, single=not body.parallel_tool_calls)
    parsed = prompt.dialect.template(calls=bool(tools)) is not None
    return reader, prompt.dialect.hidden(tokenizer) if parsed else None
