"""How a terminal shows an answer as it comes: as text, or with its drafts by colour and its speed. Knows no model."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from runtime.text.transcript import Round, Token, Written

# By exit, shallowest first; more exits begin anew.
COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
REJECTED = "dim strike"
# Tokens that wait for the end of their round; plain decoding has no rounds.
MAX_PENDING = 32


class TextView:
    """Prints the text, and nothing else."""

    def __enter__(self) -> "TextView":
        return self

    def __exit__(self, *exception: object) -> None:
        print(flush=True)

    def show(self, event: Token | Round) -> None:
        """Print what came."""
        if isinstance(event, Token) and event.text:
            print(event.text, end="", flush=True)

    def summarize(self, written: Written) -> None:
        """Nothing: the text has been printed."""


class RoundsView:
    """Accepted drafts in the colour of their exit, rejected ones dimmed between words, the speed below.

    Of rejected drafts those are shown that stood where the target chose another token: all others were made for a text
    that did not come.

    Args:
        exit_layers: that may draft, shallowest first; 0 is the lookup.
    """

    def __init__(self, console: Console, tokenizer: Any, exit_layers: Sequence[int]) -> None:
        self.console = console
        self.tokenizer = tokenizer
        self.styles = {layer: COLOURS[index % len(COLOURS)] for index, layer in enumerate(exit_layers)}
        self.tokens = 0
        self._line = Text()
        self._pending: list[str] = []
        self._rejected: list[str] = []
        self._first_at = 0.0
        self._live: Live | None = None

    def legend(self) -> Text:
        """What the colours mean."""
        names = [(self._name(layer), style) for layer, style in self.styles.items()]
        parts: list[Any] = ["drafted by "]
        for name in names:
            parts += [name, ", "]
        return Text.assemble(*parts, "or by nobody; ", self._struck("rejected"))

    def __enter__(self) -> "RoundsView":
        self.tokens, self._line, self._pending, self._rejected = 0, Text(), [], []
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="visible")
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush([(text, "") for text in self._pending])
        self._add_rejected()
        if self._live is not None:
            self._live.update(self._line, refresh=True)
            self._live.stop()
        else:
            self.console.print(self._line, soft_wrap=True)

    def show(self, event: Token | Round) -> None:
        """Take what came; a token is shown when its round is over."""
        if isinstance(event, Token):
            if event.id is not None:
                self.tokens += 1
                self._first_at = self._first_at if self.tokens > 1 else time.perf_counter()
            self._pending.append(event.text)
            if len(self._pending) > MAX_PENDING:
                self._flush([(text, "") for text in self._pending])
            return
        split = len(self._pending) - event.num_tokens
        before, ours = self._pending[:split], self._pending[split:]
        styles = [self.styles.get(event.exit_layers[index], "") for index in event.accepted]
        pieces = [(text, "") for text in before] + list(zip(ours, styles, strict=False))
        if event.num_tokens > len(event.accepted):
            self._flush(pieces)
            end = event.accepted[-1] + 1 if event.accepted else 0
            branches = [token for token, parent in zip(event.drafts, event.parents, strict=True) if parent == end]
            self._rejected += [self.tokenizer.decode([token]) for token in branches]
            pieces = [(ours[-1], "")]
        self._flush(pieces)

    def summarize(self, written: Written) -> None:
        """One line of figures."""
        stats = written.stats
        speed = stats.emitted / stats.seconds
        said = [f"{stats.emitted} tokens", f"{speed:.1f} tokens/s with the prompt"]
        if stats.rounds:
            said.append(f"{stats.mean_accepted_length:.2f} a round")
            said.append(f"{stats.acceptance_rate:.0%} of drafts accepted")
        self.console.print(Text(f"({', '.join(said)})", style="dim"))

    def _struck(self, text: str) -> tuple[str, str]:
        """A draft that is not in the text; marked by signs where there are no colours."""
        text = text.replace("\n", "\u21b5")  # a line break that is not one
        return (text, REJECTED) if self.console.is_terminal else (f"~{text}~", "")

    def _name(self, layer: int) -> str:
        return f"layer {layer}" if layer else "lookup"

    def _flush(self, pieces: Sequence[tuple[str, str]]) -> None:
        """Add to the line; whole lines leave the live part of the screen, which must stay small."""
        self._pending = []
        for text, style in pieces:
            if text[:1].isspace():
                self._add_rejected()
            self._line.append(text, style)
        done, _, _ = self._line.plain.rpartition("\n")
        if done:
            whole, self._line = self._line[: len(done)], self._line[len(done) + 1 :]
            self.console.print(whole, soft_wrap=self._live is None)
        if self._live is not None:
            self._live.update(Group(self._line, Text(self._speed(), style="dim")), refresh=True)

    def _add_rejected(self) -> None:
        """Add the rejected drafts that wait for the end of a word, apart from it, so that words stay whole."""
        for text in self._rejected:
            if text.strip():
                self._line.append(" ").append(*self._struck(text.strip()))
        self._rejected = []

    def _speed(self) -> str:
        took = time.perf_counter() - self._first_at
        return f"{(self.tokens - 1) / took:.1f} tokens/s" if self.tokens > 1 and took > 0 else ""


def is_interactive() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin.isatty() and sys.stdout.isatty()
