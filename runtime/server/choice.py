"""`Choice`: one of the answers to a request: its job, and what the worker tells of it. Knows no response bodies."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from runtime.server.job import Job
from runtime.server.metrics import Metrics
from runtime.server.penalties import CountPenalties
from runtime.server.request.prompts import Prompt
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.server.top_logprobs import LogprobsForm
from runtime.server.worker import Worker
from runtime.text.transcript import Round, Token, Transcript, Written

Event = Token | Round | Written | BaseException


@dataclass(slots=True)
class Choice:
    """One call of `generate`, from the queue to its end.

    Attributes:
        index: among the choices of its request.
        echo: text that comes before the answer's own.
        events: what the worker told and nobody has taken yet.
        form: the tokens' probabilities.
        written: what came of it.
    """

    index: int
    prompt: Prompt
    echo: str
    job: Job
    events: "asyncio.Queue[Event]"
    form: LogprobsForm
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
    ) -> "Choice":
        """The choice of that index, not in the queue yet."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        told: list[float] = []  # when the last token came

        def tell(event: Event) -> None:
            if isinstance(event, Token) and event.id is not None:
                told.append(time.perf_counter())
                if len(told) > 1:
                    metrics.between.observe(told[-1] - told.pop(0))
            with suppress(RuntimeError):  # nobody listens any more: the server has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        def finish(outcome: Written | BaseException) -> None:
            if isinstance(outcome, Written):  # also where nobody waits for it any more
                metrics.record(prompt.num_tokens, outcome.stats)
            tell(outcome)

        options = body.sampling() | {"max_new_tokens": max_new_tokens}
        seed = None if body.seed is None else body.seed + index % body.n
        transcript = Transcript(worker.tokenizer, stop=body.stop, num_logprobs=body.num_logprobs, listener=tell)
        job = Job(prompt.ids.to(worker.model.device), transcript, options, seed, body.specbound.enabled, finish)
        if body.presence_penalty or body.frequency_penalty:
            presence, frequency = body.presence_penalty, body.frequency_penalty
            job.processors = [CountPenalties(prompt.num_tokens, presence=presence, frequency=frequency)]
        if body.echo:
            job.num_prompt_logprobs = body.num_logprobs
        form = LogprobsForm(worker.tokenizer, chat=isinstance(body, ChatRequest))
        return cls(index, prompt, prompt.text if body.echo else "", job, events, form)

    @property
    def text(self) -> str:
        """All of it so far."""
        return self.echo + self.job.transcript.text

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
            self.form.add(event)
        elif isinstance(event, Written):
            self.written = event
