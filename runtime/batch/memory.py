"""`KVMemory`: how much memory keys and values may take, counted in tokens, and whole prompts kept where there is room.

Knows no request.
"""

from collections import OrderedDict
from typing import Any

import torch

from runtime.decoding.families import numbers_per_token
from runtime.errors import ConfigError
from runtime.exact.packed import free_memory

# Of what is free when it is not said otherwise; the rest is for prompts while they are read, scores and others.
SHARE = 0.5
# Bytes taken for free where the system does not say what is.
UNKNOWN = 8 << 30
MAX_PROMPTS = 16
# Of prompt and answer, where nobody says how many requests may run; and the most of them, where rows of all go through
# each product together and where they do not, so that more only share the time out.
USUAL_TOKENS, MOST_TOGETHER, MOST_APART = 2048, 16, 8


class TooLong(ConfigError):
    """A prompt and its answer whose keys and values never have room."""


class KVMemory:
    """Tokens whose keys and values have room: a request takes its longest before it begins, and gives it back.

    Prompts are kept in what is left; the one not asked for longest goes first, also where a request needs room.

    Args:
        tokens: that have room.
        sole: nobody else can write the model's weights while it lives, so that they need not be summed for it.

    Attributes:
        used: tokens that requests have taken.
        kept: tokens of prompts.
    """

    def __init__(self, tokens: int, *, sole: bool = False) -> None:
        self.tokens, self.sole, self.used, self.kept = tokens, sole, 0, 0
        self._prompts: OrderedDict[Any, tuple[int, Any]] = OrderedDict()
        self._read_by: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any, num_bytes: int | None = None, *, sole: bool = False) -> "KVMemory":
        """So many bytes of a model's keys and values; half of what is free now where none are given.

        Raises:
            ConfigError: not one token has room.
        """
        each = bytes_per_token(model)
        room = int(SHARE * _free(model)) if num_bytes is None else num_bytes
        if room < each:
            raise ConfigError(f"{room} bytes for keys and values: one token of this model takes {each}, give more")
        return cls(room // each, sole=sole)

    @property
    def usage(self) -> float:
        """The part that requests have taken, 0 to 1."""
        return self.used / max(1, self.tokens)

    def check(self, tokens: int) -> None:
        """Raise TooLong where so many never have room."""
        if tokens > self.tokens:
            raise TooLong(
                f"prompt, answer and drafts of {tokens} tokens: keys and values have room for {self.tokens};"
                " ask for fewer new tokens, or give keys and values more memory"
            )

    def fit(self, prompt_tokens: int, max_new_tokens: int, drafts: int, *, shorten: bool) -> int:
        """How many tokens an answer may have; with `shorten` as many of them as there is ever room for.

        Raises:
            TooLong: so many never have room, or not one.
        """
        beside = rows_of(prompt_tokens, drafts)
        if shorten:
            max_new_tokens = max(1, min(max_new_tokens, self.tokens - beside))
        self.check(beside + max_new_tokens)
        return max_new_tokens

    def usual_requests(self, model: Any) -> int:
        """How many requests of a usual length have room at once, from 1 to as many as it pays to run together.

        Args:
            model: with an adapter; where its layers run natively, rows of all requests go through products together.
        """
        certificate = model.specbound.certificate
        most = MOST_TOGETHER if certificate is not None and certificate.policy.native else MOST_APART
        context = int(model.config.get_text_config().max_position_embeddings)
        return max(1, min(most, self.tokens // min(context, USUAL_TOKENS)))

    def has_room(self, tokens: int) -> bool:
        """Whether so many have room now."""
        return self.used + tokens <= self.tokens

    def take(self, tokens: int) -> bool:
        """Take room for so many, if there is; whether there was."""
        if not self.has_room(tokens):
            return False
        self.used += tokens
        self._make_room(0)
        return True

    def give_back(self, tokens: int) -> None:
        """What was taken."""
        self.used -= tokens

    def keep(self, key: Any, tokens: int, prompt: Any) -> None:
        """Keep what was made of a prompt of so many tokens, if there is room beside those of requests."""
        if self.has_room(tokens):
            self._make_room(tokens)
            self._prompts[key] = tokens, prompt
            self.kept += tokens
        while len(self._prompts) > MAX_PROMPTS:
            self._drop()

    def belong_to(self, weights: torch.Tensor) -> None:
        """Forget prompts that were read by other weights, told by sums: a write through `.data` tells nothing."""
        if self._read_by is not None and not torch.equal(self._read_by, weights):
            while self._prompts:
                self._drop()
        self._read_by = weights

    def find(self, key: Any) -> Any:
        """What was kept of a prompt; None where it is not."""
        if key not in self._prompts:
            return None
        self._prompts.move_to_end(key)
        return self._prompts[key][1]

    def items(self) -> list[tuple[Any, Any]]:
        """Keys and what was kept, of all prompts, the newest first."""
        return [(key, prompt) for key, (_, prompt) in reversed(self._prompts.items())]

    def _make_room(self, tokens: int) -> None:
        """Drop prompts until so many tokens more have room."""
        while self._prompts and self.used + self.kept + tokens > self.tokens:
            self._drop()

    def _drop(self) -> None:
        _, (tokens, _) = self._prompts.popitem(last=False)
        self.kept -= tokens


def rows_of(length: int, drafts: int) -> int:
    """Rows of keys that a text of so many tokens, prompt included, takes at most, and so many drafts behind it."""
    return length + drafts + 1


def bytes_per_token(model: Any) -> int:
    """Of one token's keys and values in all layers; a layer with a window keeps all of them too."""
    return numbers_per_token(model) * int(model.dtype.itemsize)


def _free(model: Any) -> int:
    """Bytes that are free where the model lies."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    return free_memory() or UNKNOWN
