"""`LogprobsForm`: the probabilities of tokens as OpenAI's responses have them. Knows no requests."""

from collections.abc import Sequence
from typing import Any

from runtime.text.logprobs import Logprobs
from runtime.text.transcript import UNFINISHED, Token

# JSON has no infinity; OpenAI writes this for what can hardly be.
LOWEST = -9999.0


class LogprobsForm:
    """Collects tokens, and hands out the `logprobs` of those that came since.

    Args:
        chat: a chat's form, or that of a completion.

    Attributes:
        shown: characters of the text before the next token.
    """

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.shown = 0
        self._pending: list[tuple[int | None, Logprobs | None, int]] = []

    def add_prompt(self, tokens: Sequence[Token], logprobs: Sequence[Logprobs]) -> None:
        """An echoed prompt's tokens; the first has no probability, having nothing before it."""
        for token, figures in zip(tokens, [None, *logprobs], strict=True):
            self._pending.append((token.id, figures, self.shown))
            self.shown += len(token.text)

    def add(self, token: Token) -> None:
        """The next token, or text that was held back."""
        if token.logprobs is not None:
            self._pending.append((token.id, token.logprobs, self.shown))
        self.shown += len(token.text)

    def take(self) -> dict[str, Any] | None:
        """Of the tokens since the last call; None where there are none, or none was asked for."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        if self.chat:
            return {"content": [self._entry(id, figures) for id, figures, _ in pending if figures], "refusal": None}
        return {
            "tokens": [self._text(id) for id, _, _ in pending],
            "token_logprobs": [figures and _finite(figures.chosen) for _, figures, _ in pending],
            "top_logprobs": [figures and self._by_text(id, figures) for id, figures, _ in pending],
            "text_offset": [shown for _, _, shown in pending],
        }

    def _entry(self, id: int | None, figures: Logprobs) -> dict[str, Any]:
        top = [self._named(other, value) for other, value in figures.top]
        return self._named(id, figures.chosen) | {"top_logprobs": top}

    def _named(self, id: int | None, value: float) -> dict[str, Any]:
        text = self._text(id)
        whole = UNFINISHED not in text  # a token may be a part of a character
        return {"token": text, "logprob": _finite(value), "bytes": list(text.encode()) if whole else None}

    def _by_text(self, id: int | None, figures: Logprobs) -> dict[str, float]:
        """The likeliest and the chosen one; of those that look the same, the likeliest."""
        by_text: dict[str, float] = {}
        for other, value in [*figures.top, (id, figures.chosen)]:
            by_text.setdefault(self._text(other), _finite(value))
        return by_text

    def _text(self, id: int | None) -> str:
        text: str = self.tokenizer.decode([id])
        return text


def _finite(value: float) -> float:
    return max(value, LOWEST)
