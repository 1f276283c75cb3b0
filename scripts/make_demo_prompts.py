"""Write configs/data/demo_prompts.jsonl: short, varied instructions for a small assistant model.

    python scripts/make_demo_prompts.py [--output FILE]

The same prompts on every machine and Python: only `Random.random`, which Python keeps stable, draws.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from demo_words import (
    ANGLES,
    EMAILS,
    FUNCTIONS,
    GOODS,
    HEROES,
    NAMES,
    NEWS,
    OBJECTS,
    PLACES,
    QUESTIONS,
    REACTIONS,
    RECIPIENTS,
    SENTENCES,
    STEPS,
    TOPICS,
    TOWNS,
)

SEED = 20
MAX_WORDS = 60
# Two prompts share at most this part of their distinct words (Jaccard), so that none is a near copy.
MAX_OVERLAP = 0.75

TOPIC_TASKS = [
    [
        "Explain {0} to a ten-year-old in a few sentences.",
        "In simple words, how would you describe {0} to somebody who has never heard of it?",
        "Give me a clear explanation of {0} with one everyday example.",
    ],
    [
        "List five interesting facts about {0}.",
        "What are three things most people do not know about {0}? Use bullet points.",
        "Make a numbered list of four reasons to learn more about {0}.",
    ],
    [
        "Write a short poem about {0}.",
        "Compose a four-line rhyme on the subject of {0} for a school magazine.",
        "Please write a haiku inspired by {0}.",
    ],
    [
        "Write three quiz questions about {0}, each followed by its answer.",
        "Create one multiple-choice question on {0} with four options and mark the correct option.",
    ],
    [
        "Why does {0} matter in daily life? Answer in one paragraph.",
        "Write the opening paragraph of an essay which argues that schools should teach more about {0}.",
        "What might the world look like without {0}?",
    ],
    [
        "Suggest a title and a two-sentence introduction for a podcast episode on {0}.",
        "Draft a short advertisement for an evening lecture about {0}.",
        "Invent a headline and first sentence for a newspaper article about {0}.",
    ],
    [
        "I have to give a talk about {0} tomorrow. Outline it in four points.",
        "What is a common misunderstanding about {0}, and what is actually true?",
        "A visitor asks a museum guide about {0}. Write what the guide replies.",
    ],
]

STORIES = [
    "Write a short story about {hero} and {object}. It takes place at {place}.",
    "Tell me a bedtime story set in {place}. The main character is {hero}.",
    "Begin a mystery in which {hero} receives {object}. Stop at the most exciting moment.",
    "Describe {place} at dawn, as seen by {hero}, in about five sentences.",
    "Write a dialogue between {hero} and {hero2} who argue over {object}.",
    "Invent a funny ending: {hero} travels to {place} and forgets {object} at home.",
    "What would {hero} write in a diary after a week at {place}?",
]

FUNCTION_ASKS = [
    "Write a Python function that {0}.",
    "In Python, show code that {0}, with a docstring and one example call.",
    "I need a helper which {0}. Write it in Python and explain it briefly.",
    "Give a Python implementation, as short as is readable, that {0}.",
]

SUMS = [
    "{name} has {b} {goods} and buys {a} more. Then {c} are given away. How many {goods} remain?",
    "A train travels at {a}0 kilometres per hour. How far does it get in {c} hours and thirty minutes?",
    "{name} reads {a} pages each evening. How many evenings are needed for a novel of {d} pages?",
    "A shop sells {goods} at {c} dollars apiece. What do {a} of them cost with a discount of ten percent?",
    "Share {d} {goods} equally among {c} children. How many does each get, and how many are left over?",
    "{name} earns {a} dollars an hour, works {b} hours, then pays {d} dollars of rent. What is left?",
    "A rectangular garden is {a} metres long and {b} metres wide. Find its area and its perimeter.",
    "{name} is {c} years older than {name2}. Together their ages add up to {d}. How old is each of them?",
    "Half of the {d} {goods} in a box are red, and {a} of the others are blue. How many are neither?",
    "A recipe for {c} people needs {a}0 grams of flour. How much flour do {b} people need? Show your work.",
    "What is {d} minus {b}, multiplied by {c}? Work it out step by step.",
    "{name} saves {c} dollars every day. After how many days can {name} buy a coat for {d} dollars?",
]

SENTENCE_ASKS = [
    "Translate into French: {0}",
    'How do you say "{0}" in Spanish?',
    "Please give the German translation of this sentence. {0}",
    "Rewrite this so that it sounds more formal: {0}",
    "Put the following sentence into the past tense and make it more vivid. {0}",
    "Rephrase in a cheerful tone, using different words: {0}",
    'Continue the text with two more sentences: "{0}"',
    "List every noun and verb in: {0}",
]

NEWS_ASKS = [
    "Summarise in one short sentence: {0}",
    "What is the main point of this text? {0}",
    "Write a headline for this news item: {0}",
    "Read the text and say who might be unhappy, and why. {0}",
]

EMAIL_ASKS = [
    "Write a short email to {0} {1}.",
    "Draft a polite message of about five sentences to {0}, {1}.",
    "Help me with a friendly note to {0} {1}. Keep it under eighty words.",
]

STEPS_ASKS = [
    "Explain step by step how to {0}.",
    "What do I need to {0}, and in which order should I work?",
    "Give a beginner six short instructions to {0}.",
    "Which mistakes should I avoid when I {0}?",
]


def parts(text: str) -> list[str]:
    """The entries of one of the lists of demo_words; they are parted by bars and ends of lines."""
    return [entry.strip() for entry in re.split(r"[|\n]", text) if entry.strip()]


class Draw:
    """Random choices that are the same on every Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """A number from 0 to below the limit."""
        return int(self._random.random() * limit)

    def one(self, entries: list[str]) -> str:
        """One of the entries."""
        return entries[self.below(len(entries))]

    def shuffled(self, entries: list[str]) -> list[str]:
        """The entries in another order."""
        return [entry for _, entry in sorted((self._random.random(), entry) for entry in entries)]


def candidates(draw: Draw) -> Iterator[str]:
    """Every prompt in the order of its task, some of them too alike."""
    for asks in TOPIC_TASKS:
        for i, topic in enumerate(draw.shuffled(parts(TOPICS))):
            ask = asks[i % len(asks)].format(topic)
            # Every third goes without an angle: plain questions are the most usual.
            yield ask if i % 3 == 0 else f"{ask} {draw.one(parts(ANGLES))}"
    for i in range(91):
        hero, hero2 = draw.shuffled(parts(HEROES))[:2]
        yield STORIES[i % len(STORIES)].format(
            hero=hero, hero2=hero2, place=draw.one(parts(PLACES)), object=draw.one(parts(OBJECTS))
        )
    for job in parts(FUNCTIONS):
        yield draw.one(FUNCTION_ASKS).format(job)
    for i in range(60):
        name, name2 = draw.shuffled(parts(NAMES))[:2]
        a, b, c = 11 + draw.below(40), 52 + draw.below(40), 3 + draw.below(7)
        yield SUMS[i % len(SUMS)].format(
            name=name, name2=name2, goods=draw.one(parts(GOODS)), a=a, b=b, c=c, d=100 + 2 * draw.below(150)
        )
    for _ in range(2):
        for sentence in draw.shuffled(parts(SENTENCES)):
            yield draw.one(SENTENCE_ASKS).format(sentence)
    for i in range(40):
        text = f"{draw.one(parts(TOWNS))} {draw.one(parts(NEWS))}. {draw.one(parts(REACTIONS))}"
        yield NEWS_ASKS[i % len(NEWS_ASKS)].format(text)
    for _ in range(2):
        for purpose in draw.shuffled(parts(EMAILS)):
            yield draw.one(EMAIL_ASKS).format(draw.one(parts(RECIPIENTS)), purpose)
    for task in parts(STEPS):
        yield draw.one(STEPS_ASKS).format(task)
    yield from parts(QUESTIONS)


def make_prompts() -> list[str]:
    """The prompts in mixed order, held to MAX_WORDS and MAX_OVERLAP."""
    draw = Draw(SEED)
    kept: list[tuple[str, set[str]]] = []
    for prompt in candidates(draw):
        words = set(re.findall(r"[a-z0-9]+", prompt.lower()))
        near = any(len(words & other) > MAX_OVERLAP * len(words | other) for _, other in kept)
        if not near and len(prompt.split()) <= MAX_WORDS:
            kept.append((prompt, words))
    # Mixed, so that any first part of the file holds every task.
    return draw.shuffled([prompt for prompt, _ in kept])


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write the demonstration prompts.")
    default = Path(__file__).resolve().parents[1] / "configs" / "data" / "demo_prompts.jsonl"
    parser.add_argument("--output", type=Path, default=default)
    output: Path = parser.parse_args().output
    prompts = make_prompts()
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(lines, encoding="utf-8", newline="\n")
    temporary.replace(output)
    print(f"wrote {len(prompts)} prompts to {output}")


if __name__ == "__main__":
    main()
