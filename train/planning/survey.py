"""`Survey`: what a fit would make of a collection of conversations, in tokens. Needs a tokenizer and no model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from runtime.text.encode import encode
from runtime.text.prompts import Message, Prompt
from train.corpus.collection import SILENT, Collection
from train.corpus.conversation import Conversation
from train.corpus.options import CorpusOptions
from train.corpus.prompts import (
    SPLITS,
    assign_split,
    deduplicate,
    ngram_filter,
    prompts_left,
    special_tokens,
    token_warnings,
    with_tokens,
)

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Survey:
    """Figures of the conversations of some sources. Lengths are in tokens.

    Attributes:
        rows: rows read.
        skipped: reason -> rows that could not be understood.
        first: reason -> where the first of them stands.
        conversations: those left, without duplicates and prompts like those of evaluation files.
        duplicates, sharing_13_words: those taken out.
        systems: conversations that begin with a system's message.
        turns: number of turns -> conversations.
        prompts: length of every turn's prompt; later turns hold the given answers, or none where there are none.
        answers: length of every given answer.
        too_long: prompts above `max_prompt_tokens`.
        cut: given answers above `max_new_tokens`.
        special: special token of the tokenizer -> prompts that hold it in their text.
        special_answers: the same of answers that are kept.
        warnings: a sentence each on special tokens of prompts and answers.
        splits: split -> turns that are short enough, as far as their lengths are known.
        examples: evenly spaced conversations.
        rendered: text of each example as the base reads it, with the chat template.
    """

    rows: int
    skipped: dict[str, int]
    first: dict[str, str]
    conversations: int
    duplicates: int
    sharing_13_words: int
    systems: int
    turns: dict[int, int]
    prompts: list[int]
    answers: list[int]
    too_long: int
    cut: int
    special: dict[str, int]
    special_answers: dict[str, int]
    warnings: list[str]
    splits: dict[str, int]
    examples: list[Conversation] = field(repr=False)
    rendered: list[str] = field(repr=False)

    @classmethod
    def of(
        cls,
        collection: Collection,
        tokenizer: Any,
        options: CorpusOptions,
        *,
        keep: bool = False,
        num_examples: int = 0,
    ) -> "Survey":
        """Count; every turn is tokenized as the corpus will be.

        Args:
            keep: answers are kept, and not those of the base.

        Raises:
            DataError: the chat template refuses a conversation.
        """
        unique, duplicates = deduplicate(collection.prompts)
        kept, dropped = ngram_filter(unique, evaluation_files=options.evaluation_files)
        by_hash = {each.prompt.hash: each for each in reversed(collection.conversations)}
        chosen = [by_hash[prompt.hash] for prompt in kept]
        template = options.chat_template != "none"
        prompts, answers, long = [], [], []
        for each in tqdm(chosen, "count tokens", unit=" conversations", delay=SILENT, leave=False):
            lengths = [len(encode(tokenizer, turn, template=template)) for turn in _turns(each)]
            prompts += lengths
            long.append(_too_long(each, lengths, options.max_prompt_tokens, keep=keep))
            answers += [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in each.answers]
        texts = {"prompts": ["\n".join(prompt.texts) for prompt in kept]}
        texts["answers"] = [text for each in chosen for text in each.answers] if keep else []
        tokens = special_tokens(tokenizer)
        special = {kind: Counter(token for token, _ in with_tokens(those, tokens)) for kind, those in texts.items()}
        fractions = {name: getattr(options, name) for name in ("calibration_fraction", "held_out_fraction")}
        number = min(num_examples, len(chosen))
        examples = [chosen[index * len(chosen) // number] for index in range(number)]
        return cls(
            rows=collection.rows,
            skipped=collection.skipped,
            first=collection.first,
            conversations=len(chosen),
            duplicates=duplicates,
            sharing_13_words=len(dropped),
            systems=sum(each.prompt.messages[0].role == "system" for each in chosen),
            turns=dict(sorted(Counter(1 + len(prompt.later_turns) for prompt in kept).items())),
            prompts=prompts,
            answers=answers,
            too_long=sum(number for number, _ in long),
            cut=sum(length > options.max_new_tokens for length in answers),
            special=dict(special["prompts"]),
            special_answers=dict(special["answers"]),
            warnings=token_warnings(texts, tokens),
            splits=_turns_by_split(kept, [asked for _, asked in long], fractions),
            examples=examples,
            rendered=[_rendered(each, tokenizer, template=template, keep=keep) for each in examples],
        )

    @property
    def empty(self) -> str:
        """What to say where a split would be empty; nothing otherwise."""
        missing = [name for name, turns in self.splits.items() if not turns]
        if not missing:
            return ""
        counts = {"prompts": self.conversations, "duplicates": self.duplicates, "too_long": self.too_long}
        left = prompts_left(counts | {"sharing_13_words": self.sharing_13_words})
        advice = "raise max_prompt_tokens, " if self.too_long else ""
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        which = f"the {names} split{'s' if len(missing) > 1 else ''}"
        return f"{which} would be empty ({left}): {advice}give more prompts or other fractions"

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values: quantiles in the place of all lengths."""
        figures = {name: getattr(self, name) for name in self.__slots__}
        figures |= {"prompts": quantiles(self.prompts), "answers": quantiles(self.answers)}
        return figures | {"examples": [asdict(each) for each in self.examples]}


def quantiles(lengths: Sequence[int]) -> dict[str, float] | None:
    """Sum, mean and quantiles of lengths; None where there are none."""
    if not lengths:
        return None
    found = {f"{share:.0%}": float(np.quantile(lengths, share)) for share in QUANTILES}
    return {"tokens": float(sum(lengths)), "mean": round(float(np.mean(lengths)), 1), **found}


def _too_long(conversation: Conversation, lengths: Sequence[int], longest: int, *, keep: bool) -> tuple[int, int]:
    """How many of its turns are too long, and how many are asked: those before the first known to be too long."""
    if keep and conversation.whole:  # such a text follows its own first token, however long it is
        return 0, 1
    long = [turn for turn, length in enumerate(lengths) if length > longest]
    return len(long), long[0] if long else 1 + len(conversation.prompt.later_turns)


def _turns_by_split(prompts: Sequence[Prompt], asked: Sequence[int], fractions: dict[str, float]) -> dict[str, int]:
    counted = dict.fromkeys(SPLITS, 0)
    for prompt, turns in zip(prompts, asked, strict=True):
        counted[assign_split(prompt.hash, **fractions)] += turns
    return counted


def _turns(conversation: Conversation) -> list[list[dict[str, str]]]:
    """The messages of every turn's prompt, with the given answers before it."""
    messages = list(conversation.prompt.messages)
    turns = [[asdict(message) for message in messages]]
    for question, answer in zip(conversation.prompt.later_turns, conversation.answers, strict=False):
        messages += [Message("assistant", answer), Message("user", question)]
        turns.append([asdict(message) for message in messages])
    return turns


def _rendered(conversation: Conversation, tokenizer: Any, *, template: bool, keep: bool) -> str:
    """What the base reads of a conversation, special tokens included: the first prompt, or all that is learnt."""
    turns = _turns(conversation)
    if not keep or conversation.whole or len(conversation.answers) < len(turns):
        ids = encode(
            tokenizer, turns[-1] if keep else turns[0], template=template and not (keep and conversation.whole)
        )
    elif template:
        last = asdict(Message("assistant", conversation.answers[len(turns) - 1]))
        ids = encode(tokenizer, [*turns[-1], last], options={"add_generation_prompt": False})
    else:
        ids = encode(tokenizer, turns[-1], template=False)
        ids = [*ids, *tokenizer(conversation.answers[len(turns) - 1], add_special_tokens=False)["input_ids"]]
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text
