"""`Worker`: the one thread that loads the model and runs requests, several at once, and the queue before it.

Knows nothing of HTTP: callers are told through functions, called in this thread.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.batch import Batch, Call
from runtime.batch.memory import KVMemory
from runtime.batch.texts import join, outcome
from runtime.errors import SpecBoundError
from runtime.server.job import Ended, Job
from runtime.stats import SpeculationStats
from runtime.text.logprobs import prompt_logprobs
from runtime.text.transcript import Written

logger = logging.getLogger(__name__)


class Full(SpecBoundError):
    """As many requests as may wait are waiting.

    Attributes:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class Unavailable(SpecBoundError):
    """No request is taken now."""


class Worker:
    """Runs jobs, which begin in the order their requests came.

    A request of several jobs has one place in the queue: when one of them begins, the next goes to the end.

    Args:
        load: makes the model, whose exactness probe has run when it returns, and its tokenizer.
        max_waiting: requests that may wait.
        max_running: jobs that decode together; by default what `KVMemory.usual_requests` says of the loaded model.
        kv_bytes: memory for keys and values of those; by default half of what is free once the model is loaded.
        on_change: called whenever `state` changes.

    Attributes:
        state: `loading`, `ready`, `draining` or `failed`.
        error: why it failed.
        memory: for keys and values; none before the model is loaded.
        on_round: called after each round with its rows and how many answers were put out, in the thread that works.
    """

    def __init__(
        self,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        *,
        max_waiting: int,
        max_running: int | None = 1,
        kv_bytes: int | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.load = load
        self.max_waiting, self.max_running = max_waiting, max_running or 0  # until the model is loaded
        self.kv_bytes, self.memory = kv_bytes, KVMemory(0)
        self.on_change = on_change
        self.on_round: Callable[[int, int], object] = lambda rows, preempted: None
        self.state = "loading"
        self.error: BaseException | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._waiting: deque[deque[Job]] = deque()  # by request
        self._running: dict[Call, Job] = {}
        self._busy = 0
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
        """Jobs in the queue."""
        return sum(map(len, tuple(self._waiting)))

    @property
    def num_running(self) -> int:
        """Jobs that have left the queue and were not told what came of them."""
        return self._busy

    def start(self) -> None:
        """Begin to load, then to work."""
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Put a request's jobs at the end of the queue, where they have one place.

        Raises:
            Full: the queue is.
            Unavailable: the model is not loaded, or the server is stopping.
        """
        with self._changed:
            self._checked()
            waiting = len(self._waiting)
            free = self.max_running - self._busy  # the next to run wait no more
            if waiting + 1 > self.max_waiting + free:
                seconds = self._usual_seconds * (waiting + 1) / self.max_running
                raise Full(waiting, max(1, round(seconds)))
            self._waiting.append(deque(jobs))
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or end it at its next token."""
        job.transcript.cancelled.set()
        with self._changed:
            left = (deque(each for each in jobs if each is not job) for jobs in self._waiting)
            self._waiting = deque(jobs for jobs in left if jobs)

    def drain(self) -> None:
        """Take no more jobs, refuse those that wait; those that run go on."""
        with self._changed:
            if self.state == "ready":
                self._become("draining")
            refused, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in (job for jobs in refused for job in jobs):
            job.finish(Unavailable("the server is stopping: send the request again"))

    def stop(self, timeout: float) -> bool:
        """Drain and end the running jobs too; whether the thread ended within so many seconds."""
        self.drain()
        for job in list(self._running.values()):
            self.cancel(job)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _become(self, state: str) -> None:
        self.state = state
        self.on_change()

    def _work(self) -> None:
        try:
            loaded = self.load()
            self.memory = KVMemory.of(loaded[0], self.kv_bytes, sole=True)  # this thread alone has the model
            self.max_running = self.max_running or self.memory.usual_requests(loaded[0])
        except BaseException as error:  # told in the main thread, where it can end the process
            self.error = error
            self._become("failed")
            return
        with self._changed:
            self._loaded = loaded
            self._become("ready")
        while self._wait():
            try:
                with Batch(loaded[0], self.max_running, self.memory) as batch:
                    last = self._run(batch)
            except Exception as error:  # of the model: these requests fail, the next ones find it as it was
                last = [self._end(call, error) for call in list(self._running)]
            self._tell(last)  # when the model is free again

    def _wait(self) -> bool:
        """Wait for a job; False where there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.state == "draining")
            return bool(self._waiting)

    def _run(self, batch: Batch) -> list[Ended]:
        """Rounds until nothing runs and nothing waits; jobs join as there is room. The last are not told yet."""
        ended: list[Ended] = []
        while True:
            if self._running or self._waiting:
                self._tell(ended)
                ended = []
            while (job := self._next(batch)) is not None:
                ended += self._begin(job, batch)
            if not self._running:
                return ended
            for waiting in batch.calls:  # put out, it may be: no token comes that would end it
                waiting.cancelled = self._running[waiting].transcript.cancelled.is_set()
            calls = batch.round()
            if batch.rows:
                self.on_round(batch.rows, batch.preempted)
            for call in calls:
                transcript = self._running[call].transcript
                ended.append(self._end(call, call.error or outcome(batch, call, transcript)))

    def _tell(self, ended: Sequence[Ended]) -> None:
        for job, result in ended:
            job.finish(result)
            self._busy -= 1

    def _next(self, batch: Batch) -> Job | None:
        """The job that has waited longest, where one more may run and there are KV blocks to begin with."""
        with self._changed:
            if not self._waiting or len(self._running) >= self.max_running:
                return None
            job = self._waiting[0][0]
            if self._running and not batch.would_begin(job.prompt.shape[1], job.options["max_new_tokens"]):
                return None
            self._busy += 1
            jobs = self._waiting.popleft()
            if len(jobs) > 1:
                self._waiting.append(jobs)
            return jobs.popleft()

    def _begin(self, job: Job, batch: Batch) -> list[Ended]:
        """Let a job join the others; where it ends at once, that."""
        try:
            if job.num_prompt_logprobs is not None:
                batch.outside()
                job.prompt_logprobs = prompt_logprobs(batch.model, job.prompt, job.num_prompt_logprobs)
            if job.options["max_new_tokens"] == 0:
                return [(job, Written("length", SpeculationStats(), speculated=False))]
            call = join(
                batch, job.prompt, job.transcript, seed=job.seed, speculate=job.speculate, processors=job.processors,
                **job.options,
            )  # fmt: skip
        except Exception as error:  # its own: the others go on
            logger.exception("a request failed")
            return [(job, error)]
        self._running[call] = job
        return []

    def _end(self, call: Call, result: Written | BaseException) -> Ended:
        """What is to be told to a job that runs no more."""
        job = self._running.pop(call)
        if isinstance(result, BaseException):
            logger.error("a request failed", exc_info=result)
        self._usual_seconds += 0.3 * (time.perf_counter() - call.added - self._usual_seconds)
        return job, result
