"""`Conversation`: what a row of any of the usual forms holds: a prompt, its later turns, and answers to them.

Knows no files and no tokenizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.text.prompts import Message, Prompt
from train.settings.source import Source

# Columns with the prompt, looked for in this order, and columns with the answer to it.
COLUMNS: tuple[str, ...] = ("conversations", "conversation", "messages", "turns", "prompt")
COLUMNS += ("instruction", "question", "query", "input", "text")
ANSWERS = ("response", "completion", "output", "answer", "chosen")
MORE = ("input", "context")  # of an instruction
SYSTEM = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
ROLES |= {"model": "assistant", "bot": "assistant", "function": "tool", "observation": "tool"}
ROLES |= {role: role for role in ("system", "developer", "user", "assistant", "tool")}
# Names of roles and of fields under which a message calls a tool; what a part of a message is, by a word in its names.
CALLS = ("tool_calls", "function_call", "tool_call")
PARTS = {"tool_use": "a call of a tool", "tool_result": "what a tool gave", "tool_call": "a call of a tool"}
PARTS |= {"image": "a picture", "video": "a video", "audio": "a recording", "file": "a file", "document": "a file"}
EXPECTED = f"one of the columns {', '.join(COLUMNS)}, or the name of another as in FILE?column=NAME"
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")  # a NUL or a lone surrogate, which tokenizers refuse


class Unusable(Exception):
    """A row that cannot be understood; its text is the reason, the same for all rows of a kind."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row.

    Attributes:
        prompt: the messages to answer first, and the user's later turns.
        answers: what the data answers to the first turn and to later ones; fewer where it leaves turns unanswered.
        whole: the row is one text without roles, which is then the only message.
    """

    prompt: Prompt
    answers: tuple[str, ...] = ()
    whole: bool = False

    @classmethod
    def of(cls, row: Any, source: Source) -> "Conversation":
        """Read a row.

        Raises:
            Unusable: it holds no prompt.
        """
        if not isinstance(row, dict):
            raise Unusable(f"expected an object, got {type(row).__name__}")
        known = (source.column,) if source.column else COLUMNS
        column = next((name for name in known if row.get(name) not in (None, "", [])), None)
        if column is None:
            raise Unusable(f"nothing in the column {source.column}" if source.column else "no prompt in it")
        value = _listed(row[column])
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):  # user turns without answers
            texts = [_text(entry) for entry in value]
            read = cls(Prompt((*_system(row), Message("user", texts[0])), tuple(texts[1:])))
        elif isinstance(value, list):
            answer = _listed(_first(row, (source.answer,) if source.answer else ANSWERS))
            more = answer if isinstance(answer, list) else [answer] if isinstance(answer, dict) else []
            messages = [_message(entry) for entry in value]
            messages += [_message(entry) for entry in more] if messages[-1].role == "user" else []
            read = _turns([*_system(row), *messages])
        else:
            read = _pair(row, column, source)
        return replace(read, prompt=replace(read.prompt, task=str(row.get("category") or "")))


def _pair(row: dict[str, Any], column: str, source: Source) -> Conversation:
    """A prompt that is a text, and the answer beside it."""
    texts = [_text(row[column])]
    if column == "instruction":
        texts += [_text(row[name]) for name in MORE if row.get(name)]
    prompt = Prompt((*_system(row), Message("user", "\n\n".join(texts))))
    answer = _first(row, (source.answer,) if source.answer else ANSWERS)
    if isinstance(answer, list | dict):  # a message, or a conversation that ends with it
        answer = _message(answer[-1] if isinstance(answer, list) else answer).content
    return Conversation(prompt, () if answer is None else (_text(answer),), whole=column == "text" and answer is None)


def _turns(messages: Sequence[Message]) -> Conversation:
    """Turn by turn where user and assistant alternate; otherwise the last answer, with all before it as its prompt."""
    first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise Unusable("no message of a user")
    # Conversations cut out of longer ones begin with an answer to something that is not there.
    opening = [message for message in messages[:first] if message.role != "assistant"]
    rest = messages[first:]
    expected = ("user", "assistant")
    if all(message.role == expected[index % 2] for index, message in enumerate(rest)):
        texts = [message.content for message in rest]
        return Conversation(Prompt((*opening, rest[0]), tuple(texts[2::2])), tuple(texts[1::2]))
    last = max(index for index, message in enumerate(rest) if message.role == "user") + 1
    answered = last < len(rest) and rest[last].role == "assistant"
    return Conversation(Prompt((*opening, *rest[:last])), (rest[last].content,) if answered else ())


def _message(entry: Any) -> Message:
    """A message of chats (`role`, `content`) or of ShareGPT (`from`, `value`)."""
    if not isinstance(entry, dict):
        raise Unusable("a message that is no object")
    role = entry.get("role", entry.get("from"))
    content = entry.get("content", entry.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    called = role in CALLS or any(entry.get(name) for name in CALLS)
    if called and (role in CALLS or not (isinstance(content, str) and content.strip())):
        raise Unusable("a call of a tool in the place of a text")
    if ROLES.get(str(role)) is None:
        raise Unusable(f"a message of the unknown role {str(role)[:20]!a}")
    if content is None:
        raise Unusable("a message without a text")
    return Message(ROLES[str(role)], _text(content))


def _part(part: Any) -> str:
    """The text of a part of a message; of other kinds each is named."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        said = " ".join([str(part.get("type") or ""), *(name for name, value in part.items() if value)])
        for word, kind in PARTS.items():
            if word in said:
                raise Unusable(f"{kind} in a message, of which only text can be read")
        if isinstance(part.get("text"), str):
            return str(part["text"])
    raise Unusable("a part of a message without a text")


def _system(row: dict[str, Any]) -> tuple[Message, ...]:
    """The system's message that stands in a column of its own."""
    value = _first(row, SYSTEM)
    return (Message("system", _text(value)),) if value else ()


def _first(row: dict[str, Any], names: Sequence[str | None]) -> Any:
    return next((row[name] for name in names if name and row.get(name) not in (None, "", [])), None)


def _listed(value: Any) -> Any:
    """Tables of text hold lists as JSON, and some libraries hold a list of objects as an object of lists."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        return [dict(zip(value, entries, strict=False)) for entries in zip(*value.values(), strict=False)]
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unusable(f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise Unusable("a text that is empty")
    return _UNUSABLE.sub("\ufffd", value)
