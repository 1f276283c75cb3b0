"""`Dialect`: how a model writes its reasoning and its calls of tools. Knows no requests.

The forms are given as transformers' response templates, which its `ResponseParser` reads; a tokenizer that ships one
of its own is taken at its word.
"""

import re
from dataclasses import dataclass
from typing import Any

# Text that is no JSON is told as text.
JSON = {"content": "json", "content_args": {"allow_non_json": True}}
THINK = ("<think>", "</think>")
REASONING = {"open_pattern": r"\s*<think>\s*", "close_pattern": r"\s*</think>\s*"}
# The name stands outside of the arguments.
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


@dataclass(frozen=True, slots=True)
class Calls:
    """One form of calls.

    Attributes:
        field: of a response template.
        signs: what a chat template that asks for this form holds, all of them.
        around: what stands before the name, before the arguments and after them; None where calls are not bound.
        joint: what stands between two calls; None where there is one.
        special: of its marks, those that may be special tokens, which are no text elsewhere.
        begin, end: around what was to be a call and is not, which is told as text.
    """

    field: dict[str, Any]
    signs: tuple[str, ...]
    around: tuple[str, str, str] | None
    joint: str | None = None
    special: tuple[str, ...] = ()
    begin: str = ""
    end: str = ""


XML = Calls(
    {
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
        "transform": NAMED,
    },
    ("<tool_call>", "<function="),
    None,
    special=("<tool_call>", "</tool_call>"),
)
HERMES = Calls(
    {"open_pattern": r"\s*<tool_call>\s*", "close": "</tool_call>"} | JSON,
    ("<tool_call>",),
    ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    joint="\n",
    special=("<tool_call>", "</tool_call>"),
    begin="<tool_call>",
    end="</tool_call>",
)
MISTRAL = Calls(
    {
        "open_pattern": r"\s*\[TOOL_CALLS\]\s*(?P<name>[\w-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
        "close_pattern": r"\s*(?=\[TOOL_CALLS\])",
        "transform": NAMED,
    }
    | JSON,
    ("[TOOL_CALLS]", "[ARGS]"),
    ("[TOOL_CALLS]", "[ARGS]", ""),
    joint="",
    special=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    begin="[TOOL_CALLS]",
)
MISTRAL_LIST = Calls(
    {"open_pattern": r"\s*\[TOOL_CALLS\]\s*"} | JSON,
    ("[TOOL_CALLS]",),
    ('[TOOL_CALLS][{"name": "', '", "arguments": ', "}]"),
    special=("[TOOL_CALLS]",),
    begin="[TOOL_CALLS]",
)
LLAMA = Calls(
    {"open_pattern": r'\A\s*(?:<\|python_tag\|>\s*)?(?=\{\s*"name"\s*:)'} | JSON,
    ('"parameters": ',),
    ('{"name": "', '", "parameters": ', "}"),
    special=("<|python_tag|>",),
)
# The first whose signs are all there; what is more special stands before what is less.
FORMS = (XML, HERMES, MISTRAL, MISTRAL_LIST, LLAMA)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What is known of one model.

    Attributes:
        own: the response template that its tokenizer ships.
        thinks: whether reasoning stands between <think> and </think>.
        calls: the form of its calls; None where none is known.
        takes_tools: whether its chat template has a place for tools.
    """

    own: dict[str, Any] | None = None
    thinks: bool = False
    calls: Calls | None = None
    takes_tools: bool = False

    @classmethod
    def of(cls, tokenizer: Any, *, tools: bool = False) -> "Dialect":
        """That of a model, as its chat template and its tokens show it.

        Args:
            tools: the conversation has some, for which there may be a template of its own.
        """
        if not tokenizer.chat_template:
            return cls()
        text = tokenizer.get_chat_template(tools=[{}] if tools else None)
        own = getattr(tokenizer, "response_template", None)
        thinks = THINK[1] in text or THINK[1] in tokenizer.get_added_vocab()
        calls = next((form for form in FORMS if all(sign in text for sign in form.signs)), None)
        return cls(own, thinks, calls, re.search(r"\btools\b", text) is not None)

    def template(self, *, calls: bool) -> dict[str, Any] | None:
        """Of transformers' `ResponseParser`; None where an answer is text and nothing else."""
        if self.own is not None:
            return self.own
        fields = {"reasoning_content": REASONING} if self.thinks else {}
        if calls and self.calls is not None:
            fields["tool_calls"] = self.calls.field
        return {"start_anchor_pattern": r"\A", "fields": {"content": {}} | fields} if fields else None

    def hidden(self, tokenizer: Any) -> set[int]:
        """Special tokens that are no text, where an answer is parsed."""
        if self.own is not None:
            return set()  # its template says what ends what
        kept = {*THINK, *(self.calls.special if self.calls else ())}
        return {id for id, one in tokenizer.added_tokens_decoder.items() if one.special and one.content not in kept}

    def opening(self, tokenizer: Any, ids: list[int], continued: str | None) -> str:
        """What of the answer its prompt holds already.

        Args:
            continued: the text of the message that the answer goes on with.
        """
        if self.own is not None:
            return str(tokenizer.decode(ids))
        if continued is not None:
            return continued
        tail = str(tokenizer.decode(ids[-8:]))
        return THINK[0] if self.thinks and tail.rstrip().endswith(THINK[0]) else ""


# Nothing is known of the model, or nothing is asked.
TEXT = Dialect()
