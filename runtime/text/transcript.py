"""`Transcript`: the text of one `generate` call as it grows, cut at stop strings, and what drafted its tokens.

It is handed to `generate` twice, as stopping criterion and as streamer: the first sees every token as it is chosen,
with speculation and without, and the second is told of the rounds. Knows no server and no terminal.
"""

import threading
import time
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from runtime.decoding.accept import Accepted
from runtime.decoding.draft import Draft
from runtime.stats import SpeculationStats
from runtime.text.logprobs import LogprobRecorder, Logprobs

# How a character looks of which the last bytes are still to come.
UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Token:
    """A token was chosen.

    Attributes:
        id: of the vocabulary; None for text that was held back until the end.
        text: what can be shown with it: empty while a character, or what may be a stop string, is unfinished.
        logprobs: how likely it was, where the transcript was asked to keep that.
    """

    id: int | None
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """A round of speculation ended.

    Attributes:
        drafts: the drafted token ids, a tree's in the order in which they were made.
        parents: of each, 0 where it follows the last token before the round, n + 1 where the draft with index n.
        exit_layers: of each; 0 is the lookup.
        accepted: indices of those in the text, in its order.
        num_tokens: so many tokens came of the round, these included.
    """

    drafts: list[int]
    parents: list[int]
    exit_layers: list[int]
    accepted: list[int]
    num_tokens: int


class Transcript(StoppingCriteria):
    """Text of one `generate` call; stops it at a stop string, or when cancelled.

    Args:
        stop: strings that end the text, none of them empty; they are not part of it. Where they overlap, the one that
            is complete first ends it; of those that are at the same character, the longest.
        num_logprobs: each Token tells its probability, and those of so many of the likeliest; None tells none.
        listener: called with each Token and Round, in the thread that generates.
        hidden: ids that are no text; without any told, the tokenizer's special ones.
        ends: ids that end the text; without any told, the model's own.
        context: ids before the text that it goes on with: it is as in the whole, where many tokenizers would take away
            the space at the beginning of a text of its own.

    Attributes:
        ids: tokens so far, those of a stop string included.
        text: what the listener was given, joined.
        stopped: whether a stop string was found.
        cancelled: set, from any thread, ends the call at its next token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str] = (),
        num_logprobs: int | None = None,
        listener: Callable[[Token | Round], None] = lambda event: None,
        hidden: Container[int] | None = None,
        ends: Container[int] | None = None,
        context: Sequence[int] = (),
    ) -> None:
        assert all(stop)
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.listener, self.hidden, self.ends = listener, hidden, ends
        self.recorder = None if num_logprobs is None else LogprobRecorder(num_logprobs)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self.cancelled = threading.Event()
        self._held = ""
        # Tokens from `_shown` on are not shown yet; those from `_window` on give them their context.
        self._context = list(context)
        self._window, self._shown = -len(self._context), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Take the newest of the ids [1, T]; whether to stop with it, as a bool tensor [1]."""
        token = int(input_ids[0, -1])
        self.ids.append(token)
        piece = "" if self.stopped else self._release(self._decoded())
        self.text += piece
        self.listener(Token(token, piece, None if self.recorder is None else self.recorder.take(token)))
        done = self.stopped or self.cancelled.is_set()
        return torch.tensor([done], device=input_ids.device)

    def arguments(self, prompt: Tensor, processors: Sequence[LogitsProcessor]) -> dict[str, Any]:
        """What `generate` is to be given beside the prompt [1, T], so that its text comes here.

        Args:
            processors: of the scores, before the probabilities are noted.
        """
        recorder = [] if self.recorder is None else [self.recorder]
        return {
            "attention_mask": torch.ones_like(prompt),
            "logits_processor": LogitsProcessorList([*processors, *recorder]),
            "stopping_criteria": StoppingCriteriaList([self]),
            "streamer": self,
        }

    def put(self, value: Tensor) -> None:
        """As a streamer: nothing, the tokens come as a criterion."""

    def end(self) -> None:
        """As a streamer: what was held back is text after all."""
        rest = "" if self.stopped else self._release(self._decoded(last=True), last=True)
        if rest:
            self.text += rest
            self.listener(Token(None, rest))

    def end_round(self, draft: Draft, result: Accepted) -> None:
        """What became of a round's drafts."""
        self.listener(Round(draft.tokens, draft.parents, draft.exit_layers, result.drafts, len(result.tokens)))

    def _decoded(self, *, last: bool = False) -> str:
        """Text that the tokens not shown yet add; empty while their last character is unfinished."""
        before = self._context[self._window :] if self._window < 0 else []
        known = self._decode(before + self.ids[max(0, self._window) : self._shown])
        text = self._decode(before + self.ids[max(0, self._window) :])
        if len(text) <= len(known) or (text.endswith(UNFINISHED) and not last):
            return ""
        self._window, self._shown = self._shown, len(self.ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        if self.hidden is None:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        else:
            text = self.tokenizer.decode([id for id in ids if id not in self.hidden])
        assert isinstance(text, str)
        return text

    def _release(self, piece: str, *, last: bool = False) -> str:
        """What of the held text and this piece can be shown: not a stop string, nor what may become one."""
        text = self._held + piece
        found = [(text.find(string) + len(string), text.find(string)) for string in self.stop if string in text]
        if found:  # which one wins does not depend on how the text came in pieces
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = 0 if last else max((_overlap(text, string) for string in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


@dataclass(frozen=True, slots=True)
class Written:
    """What a call of `write` came to.

    Attributes:
        finish_reason: `stop` (end of text, or a stop string), `length`, or `cancelled`.
        stats: of a plain call, only tokens and seconds.
        speculated: whether the call was speculative.
    """

    finish_reason: str
    stats: SpeculationStats
    speculated: bool


def write(
    model: PreTrainedModel,
    prompt: Tensor,
    transcript: Transcript,
    *,
    seed: int | None = None,
    speculate: bool = True,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Written:
    """One `model.generate` into a transcript; a seed gives the ids that `torch.manual_seed` and `generate` give.

    Args:
        model: as `load_specbound` returns it.
        prompt: token ids, shape [1, T], int64, on the model's device.
        speculate: False is plain decoding.
        processors: of the scores, before temperature, top-k and top-p.
        options: of `generate`; `max_new_tokens` is one of them.
    """
    handle: Any = model.specbound
    before = handle.stats
    if seed is None:
        torch.seed()  # or the numbers would go on from the last call's seed
    else:
        torch.manual_seed(seed)
    generate: Any = model.generate
    started = time.perf_counter()
    with nullcontext() if speculate else handle.disabled():
        generate(prompt, **transcript.arguments(prompt, processors), **options)
    seconds = time.perf_counter() - started
    speculated = handle.stats is not before  # some calls run plainly all the same
    stats = handle.stats if speculated else SpeculationStats(emitted=len(transcript.ids), seconds=seconds)
    return Written(finish_reason(model, transcript), stats, speculated)


def finish_reason(model: Any, transcript: Transcript) -> str:
    """Why a call has ended: `stop`, `length` or `cancelled`."""
    ends = ends_of(model) if transcript.ends is None else transcript.ends
    if transcript.stopped or (transcript.ids and transcript.ids[-1] in ends):
        return "stop"
    return "cancelled" if transcript.cancelled.is_set() else "length"


def ends_of(model: Any) -> list[int]:
    """Ids that end a text by the model's own generation config."""
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else ends or []
