"""`LogprobsForm`: the probabilities of tokens as OpenAI's responses have them. Knows no requests."""

from typing import Any

from runtime.text.transcript import UNFINISHED, Token

# JSON has no infinity; OpenAI writes this for what can hardly be.
LOWEST = -9999.0


class LogprobsForm:
    """Collects tokens, and hands out the `logprobs` of those that came since.

    Args:
        chat: a chat's form, or that of a completion.
    """

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self._pending: list[tuple[Token, int]] = []
        self._shown = 0

    def add(self, token: Token) -> None:
        """The next token, or text that was held back."""
        if token.logprobs is not None:
            self._pending.append((token, self._shown))
        self._shown += len(token.text)

    def take(self) -> dict[str, Any] | None:
        """Of the tokens since the last call; None where there are none, or none was asked for."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        if self.chat:
            return {"content": [self._entry(token) for token, _ in pending], "refusal": None}
        return {
            "tokens": [self._text(token.id) for token, _ in pending],
            "token_logprobs": [_finite(token.logprobs.chosen) for token, _ in pending if token.logprobs],
            "top_logprobs": [self._by_text(token) for token, _ in pending],
            "text_offset": [shown for _, shown in pending],
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        assert token.logprobs is not None
        top = [self._named(id, value) for id, value in token.logprobs.top]
        return self._named(token.id, token.logprobs.chosen) | {"top_logprobs": top}

    def _named(self, id: int | None, value: float) -> dict[str, Any]:
        text = self._text(id)
        whole = UNFINISHED not in text  # a token may be a part of a character
        return {"token": text, "logprob": _finite(value), "bytes": list(text.encode()) if whole else None}

    def _by_text(self, token: Token) -> dict[str, float]:
        """The likeliest and the chosen one; of those that look the same, the likeliest."""
        assert token.logprobs is not None
        by_text: dict[str, float] = {}
        for id, value in [*token.logprobs.top, (token.id, token.logprobs.chosen)]:
            by_text.setdefault(self._text(id), _finite(value))
        return by_text

    def _text(self, id: int | None) -> str:
        text: str = self.tokenizer.decode([id])
        return text


def _finite(value: float) -> float:
    return max(value, LOWEST)
