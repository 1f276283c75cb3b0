"""Counts of one `generate` call. Knows nothing of how they come about."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class SpeculationStats:
    """What speculation did in the last call.

    Attributes:
        emitted: tokens generated, the one from the prompt's own forward included.
        rounds: verification passes of the target.
        drafted: drafts made, by exit layer.
        accepted: drafts accepted, by exit layer.
        accept_counts: accepted drafts of a round -> number of rounds.
        hard_tokens: rounds that ended at a token no exit was sure of.
        resting_rounds: rounds in which nothing was drafted because it did not pay.
        unpromised: tokens that plain decoding may have chosen otherwise; 0 unless blocks are not exact.
        reused: tokens of a prompt that was read for another call.
        seconds: wall-clock time of the call, prompt included.
        parts: the same by part: prompt, draft, verify, emit.
    """

    emitted: int = 0
    rounds: int = 0
    drafted: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    accept_counts: Counter[int] = field(default_factory=Counter)
    hard_tokens: int = 0
    resting_rounds: int = 0
    unpromised: int = 0
    reused: int = 0
    seconds: float = 0.0
    parts: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count what is done inside as time of this part."""
        started = time.perf_counter()
        yield
        self.parts[part] += time.perf_counter() - started  # type: ignore[assignment]

    def record_round(
        self, exit_layers: Sequence[int], accepted: Sequence[int], num_emitted: int, *, hard: bool
    ) -> None:
        """Add one round: the exit layer of each draft, indices of those accepted, how many tokens came out."""
        self.rounds += 1
        self.emitted += num_emitted
        self.drafted.update(exit_layers)
        self.accepted.update(exit_layers[index] for index in accepted)
        self.accept_counts[len(accepted)] += 1
        self.hard_tokens += hard

    def __iadd__(self, other: "SpeculationStats") -> "SpeculationStats":
        self.emitted += other.emitted
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.accept_counts += other.accept_counts
        self.hard_tokens += other.hard_tokens
        self.resting_rounds += other.resting_rounds
        self.unpromised += other.unpromised
        self.reused += other.reused
        self.seconds += other.seconds
        self.parts += other.parts
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the counts, by exit layer where they are so kept, and the rates."""
        return {
            "emitted": self.emitted,
            "rounds": self.rounds,
            "drafted": {str(layer): count for layer, count in sorted(self.drafted.items())},
            "accepted": {str(layer): count for layer, count in sorted(self.accepted.items())},
            "acceptance_rate": round(self.acceptance_rate, 4),
            "mean_accepted_length": round(self.mean_accepted_length, 4),
            "hard_tokens": self.hard_tokens,
            "resting_rounds": self.resting_rounds,
            "unpromised": self.unpromised,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.emitted / self.seconds, 2) if self.seconds else None,
        }

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        drafted = self.drafted.total()
        return self.accepted.total() / drafted if drafted else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens emitted per verification pass, recovered and bonus tokens counted; 0 before the first pass."""
        tokens = sum((count + 1) * rounds for count, rounds in self.accept_counts.items())
        return tokens / self.rounds if self.rounds else 0.0
