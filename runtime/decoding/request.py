"""`Request`: one text being generated, and what its rounds need. Knows no other request."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from runtime.decoding.accept import Accepted
from runtime.decoding.state import DecodeState
from runtime.drafting.policy import SpeculationBounds
from runtime.stats import SpeculationStats


class Emitter(Protocol):
    """Turns target logits into emitted tokens, as plain decoding does, one call a token."""

    def emit(self, logits: Tensor) -> tuple[int, bool]:
        """Choose and emit the next token from target logits [1, V]; whether generation stops with it."""

    @property
    def remaining(self) -> int:
        """How many more tokens may be emitted."""

    @property
    def stop_tokens(self) -> Collection[int]:
        """Ids that end the text."""


@dataclass(slots=True, eq=False)
class Request:
    """One text being generated.

    Attributes:
        state: settled up to, but not including, `newest`.
        on_round: told what was drafted (a `Draft`) and what became of it, after the round's tokens were emitted.
        newest: the last emitted token.
        stopped: whether the text has ended.
        error: what its emitter or `on_round` raised; the text ends there.
    """

    state: DecodeState
    bounds: SpeculationBounds
    emitter: Emitter
    stats: SpeculationStats
    on_round: Callable[[Any, Accepted], None] | None = None
    newest: int = -1
    stopped: bool = False
    error: BaseException | None = None

    def begin(self, prompt_logits: Tensor) -> None:
        """Emit the first token.

        Args:
            prompt_logits: target logits [1, V] after the prompt, which `state` holds.
        """
        self.newest, self.stopped = self.emitter.emit(prompt_logits)
        self.stats.emitted += 1
