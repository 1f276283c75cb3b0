"""`Worker`: the one thread that loads the model and runs requests, one after another, and the queue before it.

Knows nothing of HTTP: callers are told through functions, called in this thread.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from runtime.errors import SpecBoundError
from runtime.stats import SpeculationStats
from runtime.text.logprobs import Logprobs, prompt_logprobs
from runtime.text.transcript import Transcript, Written, write

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Job:
    """One request.

    Attributes:
        prompt: token ids, shape [1, T], int64.
        options: of `generate`; with a `max_new_tokens` of 0 it is not called.
        processors: of its scores, before those that it makes of the options of sampling.
        finish: called once, with what came of it or with the exception that ended it.
        num_prompt_logprobs: the prompt's tokens are told their probabilities, and those of so many of the likeliest;
            None tells none.
        prompt_logprobs: those, from the second token on, before the first token of the answer is.
    """

    prompt: Tensor
    transcript: Transcript
    options: dict[str, Any]
    seed: int | None
    speculate: bool
    finish: Callable[[Written | BaseException], None]
    processors: Sequence[LogitsProcessor] = ()
    num_prompt_logprobs: int | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    def run(self, model: PreTrainedModel) -> Written:
        """Do it, in the thread whose model this is."""
        if self.num_prompt_logprobs is not None:
            self.prompt_logprobs = prompt_logprobs(model, self.prompt, self.num_prompt_logprobs)
        if self.options["max_new_tokens"] == 0:
            return Written("length", SpeculationStats(), speculated=False)
        return write(
            model, self.prompt, self.transcript, seed=self.seed, speculate=self.speculate,
            processors=self.processors, **self.options,
        )  # fmt: skip


class Full(SpecBoundError):
    """As many requests as may wait are waiting.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, waiting: int, asked: int, retry_after: int) -> None:
        places = "" if asked == 1 else f", and this one asks for {asked} places"
        super().__init__(f"{waiting} requests are waiting already{places}: try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(SpecBoundError):
    """No request is taken now."""


class Worker:
    """Runs jobs in the order they came.

    Args:
        load: makes the model, whose exactness probe has run when it returns, and its tokenizer.
        max_waiting: requests that may wait while one runs.
        on_change: called whenever `state` changes.

    Attributes:
        state: `loading`, `ready`, `draining` or `failed`.
        error: why it failed.
    """

    def __init__(
        self,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        *,
        max_waiting: int,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.load = load
        self.max_waiting = max_waiting
        self.on_change = on_change
        self.state = "loading"
        self.error: BaseException | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._usual_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="specbound-worker", daemon=True)

    @property
    def model(self) -> Any:
        """The model; only to be looked at from other threads."""
        return self._checked()[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._checked()[1]

    def _checked(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.state != "ready" or self._loaded is None:
            raise Unavailable(f"the model is {self.state}: no request can be taken now")
        return self._loaded

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests at which the model works: one or none."""
        return int(self._running is not None)

    def start(self) -> None:
        """Begin to load, then to work."""
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Put jobs at the end of the queue, all or none.

        Raises:
            Full: the queue is.
            Unavailable: the model is not loaded, or the server is stopping.
        """
        with self._changed:
            self._checked()
            waiting = len(self._waiting)
            if waiting + len(jobs) > self.max_waiting + (self._running is None):  # the next to run waits no more
                raise Full(waiting, len(jobs), max(1, round(self._usual_seconds * (waiting + 1))))
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or end it at its next token."""
        job.transcript.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def drain(self) -> None:
        """Take no more jobs, refuse those that wait; the one that runs goes on."""
        with self._changed:
            if self.state == "ready":
                self._become("draining")
            refused, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in refused:
            job.finish(Unavailable("the server is stopping: send the request again"))

    def stop(self, timeout: float) -> bool:
        """Drain and end the running job too; whether the thread ended within so many seconds."""
        self.drain()
        if self._running is not None:
            self.cancel(self._running)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _become(self, state: str) -> None:
        self.state = state
        self.on_change()

    def _work(self) -> None:
        try:
            loaded = self.load()
        except BaseException as error:  # told in the main thread, where it can end the process
            self.error = error
            self._become("failed")
            return
        with self._changed:
            self._loaded = loaded
            self._become("ready")
        while (job := self._next()) is not None:
            self._run(job, loaded[0])

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self.state == "draining")
            if not self._waiting:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _run(self, job: Job, model: PreTrainedModel) -> None:
        started = time.perf_counter()
        try:
            outcome: Written | BaseException = job.run(model)
        except Exception as error:  # this request's alone: the next one finds the model as it was
            logger.exception("a request failed")
            outcome = error
        self._usual_seconds += 0.3 * (time.perf_counter() - started - self._usual_seconds)
        job.finish(outcome)
