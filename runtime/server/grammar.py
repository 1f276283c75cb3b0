"""`Grammar`: binds an answer to JSON of a schema or to calls of tools, as a mask on scores. Needs the `grammar` extra.

The library is llguidance: it says which tokens may follow. What is emitted is still the target's own choice among
them, so that drafts and exactness are as without.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from runtime.errors import SpecBoundError
from runtime.server.dialect import THINK, Dialect
from runtime.server.errors import ApiError
from runtime.server.request.schema import ChatRequest
from runtime.text.transcript import ends_of

# Between the signs of JSON: without a bound a weak model may write spaces for ever.
GUIDANCE = {"x-guidance": {"whitespace_pattern": r"[ \n]{0,20}"}}

# Of the grammar, which the client has not written: a place in it, it, and how far the library came.
OURS = re.compile(r"^at \d+\(\d+\): | 1 \| start: .*| <state>.*")


class Grammar:
    """A compiled grammar.

    Args:
        tokenizer: of transformers.
        ends: ids that end a text, allowed where the grammar is satisfied.
        lark: the grammar in llguidance's form.

    Raises:
        ImportError: the library is not installed.
        ValueError: it cannot read the tokenizer or the grammar.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], lark: str) -> None:
        import llguidance

        vocabulary = _vocabulary(tokenizer, tuple(ends))
        self.matcher: Any = llguidance.LLMatcher(vocabulary, lark, log_level=0)  # what is asked is not logged
        beginning = self.matcher.deep_copy()
        if not beginning.is_error():
            beginning.compute_bitmask()  # some grammars are read, and then nothing can begin: a schema that is itself
        if beginning.is_error():
            raise ValueError(beginning.get_error())


@lru_cache(maxsize=1)  # a second or so for a large vocabulary
def _vocabulary(tokenizer: Any, ends: tuple[int, ...]) -> Any:
    """The tokenizer as the library has it."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, eos_token=list(ends))


class GrammarMask(LogitsProcessor):
    """Leaves the scores of ids that may follow, and takes all others away: a function of the ids alone.

    Args:
        prompt_tokens: so many ids are the prompt's, which is not bound.
    """

    def __init__(self, grammar: Grammar, prompt_tokens: int) -> None:
        self.grammar, self.prompt_tokens = grammar, prompt_tokens
        self._read: list[int] = []  # what the matcher has seen; another beginning starts anew
        self._matcher: Any = grammar.matcher.deep_copy()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] at the next position of the ids [1, T].

        Raises:
            SpecBoundError: the ids are not of the grammar, or it is too much for the library.
        """
        answer = input_ids[0, self.prompt_tokens :].tolist()
        if answer[: len(self._read)] != self._read:
            self._read, self._matcher = [], self.grammar.matcher.deep_copy()
        self._matcher.consume_tokens(answer[len(self._read) :])
        self._read = answer
        bits = self._matcher.compute_bitmask() if not self._matcher.is_error() else b""
        if self._matcher.is_error():
            raise SpecBoundError(f"the grammar does not go on: {self._matcher.get_error().splitlines()[0]}")
        allowed = np.zeros(scores.shape[1], dtype=bool)
        known = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[: len(allowed)]
        allowed[: len(known)] = known
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device)[None], -torch.inf)


def grammar_of(model: Any, tokenizer: Any, body: ChatRequest, dialect: Dialect, opening: str) -> Grammar | None:
    """What binds a chat's answer; None where nothing does.

    Args:
        opening: what of the answer its prompt holds already.

    Raises:
        ApiError: it cannot be bound here.
    """
    if not body.must_call and body.response_format.binding is None:
        return None
    param = "tool_choice" if body.must_call else "response_format"
    if body.must_call and (dialect.calls is None or dialect.calls.around is None):
        said = f"{param}: calls of this model are in a form that cannot be asked for: use auto"
        raise ApiError(400, said, param=param)
    ends = ends_of(model)
    if not ends:
        raise ApiError(400, f"{param} is not supported: this model has no token that ends a text", param=param)
    try:
        return Grammar(tokenizer, ends, lark_of(body, dialect, opening, special_literals(tokenizer)))
    except ImportError:
        said = f"{param} is not supported by this server: it was installed without specbound[grammar]"
        raise ApiError(400, said, param=param) from None
    except ValueError as error:
        reason = OURS.sub("", " ".join(str(error).split()))
        raise ApiError(400, f"{param} cannot be kept: {reason:.300}", param=param) from None


def special_literals(tokenizer: Any) -> Callable[[str], str]:
    """How text is written in a grammar, in which special tokens stand by their ids."""
    special = {one.content: id for id, one in tokenizer.added_tokens_decoder.items() if one.special}

    def literal(text: str) -> str:
        found = [(text.find(mark), -len(mark), mark) for mark in special if mark in text]
        if not found:
            return json.dumps(text) if text else ""
        start, _, mark = min(found)
        parts = [literal(text[:start]), f"<[{special[mark]}]>", literal(text[start + len(mark) :])]
        return " ".join(part for part in parts if part)

    return literal


def lark_of(body: ChatRequest, dialect: Dialect, opening: str, literal: Callable[[str], str]) -> str:
    """The grammar of an answer: reasoning, where the model reasons, and then what is asked for."""
    binding = body.response_format.binding
    rules = _calls(body, dialect, literal) if binding is None else [f"answer: {_json(binding)}"]
    if not dialect.thinks or dialect.own is not None:
        return "\n".join(["start: answer", *rules])
    begin, end = (literal(mark) for mark in THINK)
    opened = opening.rfind(THINK[0]) > opening.rfind(THINK[1])
    if end.startswith("<["):  # special tokens are no part of a text
        rules += [f"thinking: {'' if opened else begin} TEXT {end}", r"TEXT: /(.|\n)*/"]
    else:
        rules += [rf"thinking[lazy]: /{'' if opened else THINK[0]}(.|\n)*<\/think>/"]
    start = "start: thinking SPACE? answer" if opened else "start: (thinking SPACE?)? answer"
    return "\n".join([start, *rules, r"SPACE: /[ \n]+/"])


def _calls(body: ChatRequest, dialect: Dialect, literal: Callable[[str], str]) -> list[str]:
    """Rules of one call or several; a schema stands alone in its rule, where its references hold."""
    assert dialect.calls is not None and dialect.calls.around is not None
    before, between, after = dialect.calls.around
    rules = []
    for index, tool in enumerate(body.called):
        schema = {"type": "object"} | (tool.function.parameters or {"properties": {}, "additionalProperties": False})
        rules.append(f"call_{index}: {literal(before + tool.function.name + between)} with_{index} {literal(after)}")
        rules.append(f"with_{index}: {_json(schema)}")
    one = " | ".join(f"call_{index}" for index in range(len(body.called)))
    more = dialect.calls.joint is not None and body.parallel_tool_calls
    answer = f"answer: call ({literal(dialect.calls.joint or '')} call)*" if more else "answer: call"
    return [answer, f"call: {one}", *rules]


def _json(schema: dict[str, Any]) -> str:
    """JSON of a schema."""
    return f"%json {json.dumps(schema | GUIDANCE)}"
