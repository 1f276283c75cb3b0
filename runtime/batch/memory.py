"""`KVMemory`: keys and values in KV blocks of one pool of a stated number, and whole prompts kept in those left over.

Knows no request.
"""

from collections import OrderedDict
from typing import Any

import torch

from runtime.decoding.cache import BLOCK_TOKENS, blocks_of
from runtime.decoding.families import numbers_per_token
from runtime.errors import ConfigError
from runtime.exact.packed import free_memory

# Of what is free when it is not said otherwise; the rest is for prompts while they are read, scores and others.
SHARE = 0.5
# Bytes taken for free where the system does not say what is.
UNKNOWN = 8 << 30
MAX_PROMPTS = 16
# That a request of 2,048 tokens, prompt and answer, has half-way: for how many run where nobody says. And the most of
# them, where rows of all go through each product together and where they do not, so that more only share the time out.
USUAL_TOKENS, MOST_TOGETHER, MOST_APART = 1024, 16, 8


class TooLong(ConfigError):
    """A prompt and its answer whose keys and values never have room."""


class KVMemory:
    """A pool of KV blocks: a request takes those that its keys and values need, more as it grows, and gives them back.

    Prompts are kept in blocks that nobody has taken; the one not asked for longest goes first, as soon as a request
    takes them.

    Args:
        tokens: that have room; a last part of less than a block is left out.
        sole: nobody else can write the model's weights while it lives, so that they need not be summed for it.

    Attributes:
        blocks: of the pool.
        used: blocks that requests have taken.
        kept: blocks of prompts.
    """

    def __init__(self, tokens: int, *, sole: bool = False) -> None:
        self.blocks, self.sole, self.used, self.kept = tokens // BLOCK_TOKENS, sole, 0, 0
        self._prompts: OrderedDict[Any, tuple[int, Any]] = OrderedDict()
        self._read_by: torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any, num_bytes: int | None = None, *, sole: bool = False) -> "KVMemory":
        """So many bytes of a model's keys and values; half of what is free now where none are given.

        Raises:
            ConfigError: not one block has room.
        """
        each = bytes_per_token(model)
        room = int(SHARE * _free(model)) if num_bytes is None else num_bytes
        if room < each * BLOCK_TOKENS:
            raise ConfigError(
                f"{room} bytes for keys and values: a block of {BLOCK_TOKENS} tokens of this model takes"
                f" {each * BLOCK_TOKENS}, give more"
            )
        return cls(room // each, sole=sole)

    @property
    def tokens(self) -> int:
        """Tokens that all blocks have room for."""
        return self.blocks * BLOCK_TOKENS

    @property
    def free(self) -> int:
        """Blocks that no request has taken; kept prompts may lie in them."""
        return self.blocks - self.used

    @property
    def usage(self) -> float:
        """The part that requests have taken, 0 to 1."""
        return self.used / max(1, self.blocks)

    def check(self, tokens: int) -> None:
        """Raise TooLong where so many never have room."""
        if blocks_of(tokens) > self.blocks:
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
        """How many requests run at once: those of a usual length that have room half-way, from 1 to as many as pay.

        A request takes blocks as it grows, so that room for the whole of each would lie idle for most of its time. If
        more grow long at once than have room, the last ones wait for the others.

        Args:
            model: with an adapter; where its layers run natively, rows of all requests go through products together.
        """
        certificate = model.specbound.certificate
        most = MOST_TOGETHER if certificate is not None and certificate.policy.native else MOST_APART
        context = int(model.config.get_text_config().max_position_embeddings)
        return max(1, min(most, self.tokens // min(context, USUAL_TOKENS)))

    def take(self, blocks: int) -> bool:
        """Take so many, if they are free; whether they were."""
        if blocks > self.free:
            return False
        self.used += blocks
        self._make_room(0)
        return True

    def give_back(self, blocks: int) -> None:
        """What was taken."""
        self.used -= blocks

    def keep(self, key: Any, tokens: int, prompt: Any) -> bool:
        """Keep what was made of a prompt of so many tokens, if there is room beside requests; whether there was."""
        blocks = blocks_of(tokens)
        if blocks > self.free:
            return False
        self._make_room(blocks)
        self._prompts[key] = blocks, prompt
        self.kept += blocks
        while len(self._prompts) > MAX_PROMPTS:
            self._drop()
        return True

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

    def _make_room(self, blocks: int) -> None:
        """Drop prompts until so many blocks more are free of them."""
        while self._prompts and self.kept + blocks > self.free:
            self._drop()

    def _drop(self) -> None:
        _, (blocks, _) = self._prompts.popitem(last=False)
        self.kept -= blocks


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
