"""`Answerer`: renders conversations to token ids and generates the base model's own answers, in padded batches.

It does not depend on files or splits.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from runtime.errors import ConfigError, DataError
from runtime.text.encode import encode
from runtime.text.prompts import Message, Prompt
from train.corpus.options import CorpusOptions
from train.corpus.prompts import hash_fraction

Pending = tuple[Prompt, tuple[Message, ...]]  # a prompt, and its messages up to a user turn
Done = Callable[[str, list[list[int]]], object]  # told the name of a batch, and the response ids of its turns
Told = Callable[[Sequence[list[int]], str], object]  # told responses that have ended, and how far others are


@dataclass(frozen=True, slots=True)
class Turn:
    """One user turn to answer, with the conversation up to it, also as token ids."""

    prompt: Prompt
    messages: tuple[Message, ...]
    prompt_ids: list[int]
    sampled: bool


def check_template(tokenizer: Any, options: CorpusOptions) -> None:
    """Raise a ConfigError for an unknown way to write chats, a DataError where the tokenizer has no template."""
    if options.chat_template not in ("auto", "none"):
        raise ConfigError(f"chat_template {options.chat_template!r}: expected auto or none")
    if options.chat_template == "auto" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; set `chat_template: none` to use plain text")


class Answerer:
    """Turns conversations into batches of token ids, and batches into answers, with a model and its tokenizer.

    Args:
        together: the model is sharded over the processes, so all of them answer at the same time.
    """

    def __init__(self, model: Any, tokenizer: Any, options: CorpusOptions, *, together: bool = False) -> None:
        check_template(tokenizer, options)
        self.model, self.tokenizer, self.options, self.together = model, tokenizer, options, together
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = options.max_prompt_tokens if positions is None else positions - options.max_new_tokens
        self.max_prompt_tokens = min(options.max_prompt_tokens, room)
        if self.max_prompt_tokens < 1:
            raise ConfigError(
                f"max_new_tokens {options.max_new_tokens}: expected less than the {positions}"
                " positions of the model, which leaves no room for a prompt; lower it"
            )
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.eos_ids or [0])[0]

    def batches(self, pending: Sequence[Pending]) -> list[list[Turn]]:
        """Batch the turns that are short enough, sorted by length; each batch is all greedy or all sampled."""
        turns = []
        for prompt, messages in pending:
            prompt_ids = self._encode(messages, prompt=prompt)
            if 0 < len(prompt_ids) <= self.max_prompt_tokens:
                # Other digits than assign_split reads, so that every split has its share of sampled prompts.
                sampled = hash_fraction(prompt.hash, offset=16) < self.options.sample_fraction
                turns.append(Turn(prompt, messages, prompt_ids, sampled))
        turns.sort(key=lambda turn: (turn.sampled, len(turn.prompt_ids), turn.prompt.hash))
        first_sampled = sum(not turn.sampled for turn in turns)
        size = self.options.batch_size
        groups = (turns[:first_sampled], turns[first_sampled:])
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    def answer_all(self, batches: Mapping[str, Sequence[Turn]], done: Done, told: Told | None = None) -> None:
        """Answer batches, one after the other.

        Args:
            batches: by name.
            done: called with each batch as it ends.
            told: called while they are answered.
        """
        for name, batch in batches.items():
            responses = self.answer(batch, name=name, told=told)
            done(name, responses)
            if told is not None:
                told(responses, "")

    def answer(self, batch: Sequence[Turn], *, name: str, told: Told | None = None) -> list[list[int]]:
        """Generate the response ids of each turn, up to its first end-of-sequence token.

        Args:
            name: seeds sampling.
            told: called after each token of the batch.
        """
        rows, width = [turn.prompt_ids for turn in batch], max(len(turn.prompt_ids) for turn in batch)
        device = self.model.device
        input_ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        how = self.how(batch[0]) | {"synced_gpus": self.together}
        how |= {"streamer": None if told is None else _Count(told, self.options.max_new_tokens)}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed(name))
            with _dense_unembedding(self.model):
                output = self.model.generate(input_ids=input_ids, attention_mask=mask, **how)
        return [self._until_eos(row) for row in output[:, width:].tolist()]

    def next_turns(self, batch: Sequence[Turn], responses: Sequence[Sequence[int]], *, wave: int) -> Iterator[Pending]:
        """The conversations that have a turn after this wave, with the answer and the next question added."""
        for turn, response_ids in zip(batch, responses, strict=True):
            if len(turn.prompt.later_turns) > wave:
                answer = Message("assistant", self.reply(turn, response_ids))
                question = Message("user", turn.prompt.later_turns[wave])
                yield turn.prompt, (*turn.messages, answer, question)

    def reply(self, turn: Turn, response_ids: Sequence[int]) -> str:
        """The text of an answer, as the next turn's prompt holds it."""
        text: str = self.tokenizer.decode(response_ids, skip_special_tokens=True)
        return text

    def how(self, turn: Turn) -> dict[str, Any]:
        """Arguments of `generate` that decide the text of an answer."""
        options = self.options
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if turn.sampled:  # top_k 0 means off; the library's default is 50
            how = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        how |= {"num_beams": 1, "max_new_tokens": options.max_new_tokens, "use_cache": True}
        return how | {"pad_token_id": self.pad_id, "eos_token_id": self.eos_ids or None}

    def seed(self, name: str) -> int:
        """Of what bears that name alone, not of what ran before, so that a resumed run draws the same."""
        return int.from_bytes(hashlib.sha256(f"{self.options.seed} {name}".encode()).digest()[:7], "big")

    def _until_eos(self, row: list[int]) -> list[int]:
        return row[: next((end for end, token in enumerate(row, start=1) if token in self.eos_ids), len(row))]

    def _encode(self, messages: Sequence[Message], *, prompt: Prompt) -> list[int]:
        template = self.options.chat_template != "none"
        try:
            return encode(self.tokenizer, [asdict(message) for message in messages], template=template)
        except DataError as error:
            begins = f"the prompt that begins {prompt.texts[0][:60]!a}"
            raise DataError(f"{begins}: {error}; change its messages or set `chat_template: none`") from error


class _Count(BaseStreamer):
    """Tells how many tokens each answer of a batch has."""

    def __init__(self, told: Told, longest: int) -> None:
        self.told, self.longest, self.count = told, longest, -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        """The prompt, or the next token of every answer."""
        self.count += 1
        if self.count:
            self.told((), f"token {self.count} of {self.longest}")

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def _dense_unembedding(model: Any) -> Iterator[None]:
    """Make the unembedding's input contiguous: for strided rows torch copies a frozen bfloat16 weight each time."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
