"""`Job`: one call of `generate` that the worker is to make. Knows no HTTP."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from runtime.text.logprobs import Logprobs
from runtime.text.transcript import Transcript, Written


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
    processors: list[LogitsProcessor] = field(default_factory=list)
    num_prompt_logprobs: int | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)


# A job, and what came of it.
Ended = tuple[Job, Written | BaseException]
