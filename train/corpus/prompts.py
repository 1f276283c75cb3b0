"""Prompts: hashed, split, and kept apart from the evaluation texts.

A prompt is the messages to send first and the user turns that follow, each asked after the model's own answer
to the one before. Needs no model and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from runtime.text.prompts import Prompt
from train.corpus.collection import Collection

SPLITS = ("fit", "calibration", "held_out")
_WORD = re.compile(r"[^\W_]+")
# 13 hexadecimal digits are 52 bits: a float64 holds the fraction exactly and never rounds it up to 1.
_HEX_DIGITS = 13


def hash_fraction(digest: str, *, offset: int = 0) -> float:
    """Read a hash as a uniform number in [0, 1), from its hexadecimal digits starting at `offset`.

    Offsets 13 or more digits apart give independent numbers; a sha256 has room up to offset 51.
    """
    return int(digest[offset : offset + _HEX_DIGITS], 16) / 16**_HEX_DIGITS


def assign_split(digest: str, *, calibration_fraction: float, held_out_fraction: float) -> str:
    """The split, one of `SPLITS`, of the prompt with hash `digest`: the same in every run and corpus."""
    position = hash_fraction(digest)
    if position < held_out_fraction:
        return "held_out"
    return "calibration" if position < held_out_fraction + calibration_fraction else "fit"


def deduplicate(prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """The first of each group of equal prompts, in order, and the number of the others."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.hash, prompt)
    return list(unique.values()), len(prompts) - len(unique)


def with_tokens(texts: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The texts that hold one of these tokens, each behind the first that it holds."""
    if not tokens:
        return []
    pattern = re.compile("|".join(map(re.escape, tokens)))
    return [(match[0], text) for text in texts if (match := pattern.search(text))]


def token_warnings(texts: Mapping[str, Sequence[str]], tokens: Sequence[str]) -> list[str]:
    """What to say of texts that hold these tokens: the tokenizer makes real ones of them, with a chat template or not.

    Args:
        texts: by what they are, `prompts` or `answers`.
    """
    said = []
    for kind, those in texts.items():
        if found := with_tokens(those, tokens):
            token, text = found[0]
            cut = ", so an answer may be learnt up to its first end of a turn alone" if kind == "answers" else ""
            said.append(
                f"{len(found)} of {len(those)} {kind} hold special tokens in their text, which become real ones, such"
                f" as a turn's end{cut}: {token} in the one that begins {text!a:.60}; remove them from the text, or"
                f" leave those {kind} out, unless they are meant as tokens"
            )
    return said


def prompts_left(counts: Mapping[str, Any]) -> str:
    """How many prompts were left, and what became of the others, in words."""
    lost = {
        "duplicates": "duplicates of others",
        "sharing_13_words": "like evaluation prompts",
        "too_long": "too long",
    }
    reasons = [f"{counts[name]} were {reason}" for name, reason in lost.items() if counts.get(name)]
    return ", ".join([f"prompts left after cleaning: {counts.get('prompts', 0)}", *reasons])


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def ngram_filter(
    prompts: Iterable[Prompt], *, evaluation_files: Sequence[str], n: int = 13
) -> tuple[list[Prompt], list[Prompt]]:
    """Divide the prompts into those to keep and those that share a run of `n` words with an evaluation text.

    Words are lower-cased runs of letters and digits. A text of fewer than `n` words is one run: it is dropped
    only if it equals a whole evaluation text. `evaluation_files` are sources, see `Collection.read`, such as a
    benchmark's `question.jsonl`. Returns the kept and the dropped prompts, each in order.

    Raises:
        DataError: an evaluation file cannot be read.
    """
    forbidden: set[tuple[str, ...]] = set()
    for source in evaluation_files:
        for prompt in Collection.read(source).prompts:
            forbidden.update(*(_ngrams(text, n=n) for text in prompt.texts))
    kept: list[Prompt] = []
    dropped: list[Prompt] = []
    for prompt in prompts:
        shared = any(gram in forbidden for text in prompt.texts for gram in _ngrams(text, n=n))
        (dropped if shared else kept).append(prompt)
    return kept, dropped


def _ngrams(text: str, *, n: int) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    for start in range(max(len(words) - n, 0) + 1 if words else 0):
        yield tuple(words[start : start + n])
