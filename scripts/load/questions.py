"""`Question`: a request of `identity.py`, of one of several kinds. Knows no server and no model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]

SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
    "required": ["word", "count"],
    "additionalProperties": False,
}
BOUND = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}
STOPPED, BOUND_KIND, CANCELLED = "stop string", "JSON schema", "cancelled"
# Fields of each kind; those that depend on the vocabulary, the length or the answer are added below.
KINDS: dict[str, Body] = {
    "plain": {},
    STOPPED: {},
    "presence and frequency penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    "logit_bias": {},
    "repetition_penalty": {"repetition_penalty": 1.3},
    BOUND_KIND: {"response_format": BOUND},
    "n = 2": {"n": 2},
    "ignore_eos": {"ignore_eos": True},
    "min_tokens": {},
    CANCELLED: {"stream": True},
}
GREEDY: Body = {"temperature": 0}
SAMPLED: Body = {"temperature": 0.8, "top_p": 0.95}
NUM_TOP = 3  # of the likeliest tokens, where probabilities are asked for


@dataclass(slots=True)
class Text:
    """One answer.

    Attributes:
        ids: None where the server did not tell them.
        reason: why it ended, in OpenAI's words.
        logprobs: at each id, the logarithm of its probability, and those of the likeliest by their text.
    """

    text: str = ""
    ids: list[int] | None = None
    reason: str | None = None
    logprobs: list[tuple[float, dict[str, float]]] = field(default_factory=list)


@dataclass(slots=True)
class Question:
    """One request.

    Attributes:
        body: without the model's name.
        leaves_after: tokens after which its client leaves; None where it stays.
        expected: stock's answers, as many as are asked for.
    """

    kind: str
    is_chat: bool
    body: Body
    leaves_after: int | None = None
    expected: list[Text] = field(default_factory=list)

    @property
    def streams(self) -> bool:
        """Whether ids are told, one by one."""
        return bool(self.body.get("stream"))

    @property
    def traits(self) -> list[str]:
        """What it is counted under."""
        found = [self.kind, "greedy" if self.body["temperature"] == 0 else "seeded"]
        found += ["streamed" if self.streams else "whole", "chat" if self.is_chat else "completion"]
        return found + ["logprobs"] * bool(self.body.get("logprobs"))

    def stop_within(self, among: random.Random) -> list[str]:
        """Strings of which one stands in its first expected answer."""
        text = self.expected[0].text
        start = among.randrange(len(text) // 3, max(1, 2 * len(text) // 3) + 1)
        piece = text[start : start + 3]
        return [piece or "never said", "never said\0"]


def make_questions(
    texts: Sequence[str], *, tokens: int, vocabulary: int, chats: bool, without: Sequence[str], seed: int
) -> list[Question]:
    """One of each text; kinds in turn, greedy and seeded in turn, the rest at random.

    Args:
        tokens: of an answer, at most.
        vocabulary: ids from 0 on.
        chats: whether the model takes any.
        without: kinds that this server does not have.
    """
    among = random.Random(seed)
    kinds = [kind for kind in KINDS if kind not in without]
    made = []
    for number, text in enumerate(texts):
        kind, is_chat = kinds[number % len(kinds)], chats and among.random() < 0.5
        is_chat |= kind == BOUND_KIND
        body = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
        body |= {"max_tokens": tokens, "stream": among.random() < 0.6} | KINDS[kind]
        body |= SAMPLED | {"seed": 100 * number} if (number // len(kinds)) % 2 else GREEDY
        if kind == "logit_bias":
            body["logit_bias"] = {str(among.randrange(vocabulary)): among.choice([-100, -5, 2, 5]) for _ in range(20)}
        if kind == "min_tokens":
            body["min_tokens"] = tokens // 2
        if number % 3 == 0:
            body |= {"logprobs": True, "top_logprobs": NUM_TOP} if is_chat else {"logprobs": NUM_TOP}
        if body["stream"]:
            body["specbound"] = {"rounds": True}
        leaves_after = among.randrange(1, tokens // 2) if kind == CANCELLED else None
        made.append(Question(kind, is_chat, body, leaves_after))
    return made
