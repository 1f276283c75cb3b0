"""Sequences of changes: drawn, run, and where one fails, shortened to what still fails."""

import random
import traceback
from dataclasses import dataclass, field, replace

import torch

from tests.helpers.metamorphic.answers import compare_answers
from tests.helpers.metamorphic.changes import CHANGES, TABLES
from tests.helpers.metamorphic.subject import NotApplicable, Subject, base, speculative
from tests.helpers.paths import ROOT

# Seeds of a base: what is probed of one is kept for the sequences that begin with it again.
BASES = 5
# One sequence in so many is compared with a copy that has no adapter, too.
INDEPENDENT = 4


@dataclass(frozen=True)
class Sequence:
    """A model and what is done to it; each step is a change's name and the seed of what it draws."""

    family: str
    dtype: torch.dtype
    seed: int
    steps: tuple[tuple[str, int], ...] = ()

    @classmethod
    def draw(cls, family: str, dtype: torch.dtype, seed: int) -> "Sequence":
        """3 to 8 changes, each from a table drawn first."""
        numbers = random.Random(f"{family} {dtype} {seed}")
        steps = []
        for _ in range(numbers.randint(3, 8)):
            change = numbers.choice(numbers.choice(TABLES).CHANGES)
            steps.append((change.__name__, numbers.randrange(2**31)))
        return cls(family, dtype, seed, tuple(steps))

    def __str__(self) -> str:
        names = ", ".join(f"{name}({seed})" for name, seed in self.steps)
        return f"{self.family} {str(self.dtype).removeprefix('torch.')} seed {self.seed}: {names}"


@dataclass
class Count:
    """Sequences run, those in which an answer after some change accepted drafts, and answers compared.

    Attributes:
        begun: sequences whose answer before any change came from our own kernels.
        native: those in which one after a change did.
        altered: last changes after which stock answered otherwise than before all changes.
    """

    sequences: int = 0
    speculating: int = 0
    answers: int = 0
    accepting: int = 0
    begun: int = 0
    native: int = 0
    altered: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"{self.sequences} sequences, {self.speculating} of them speculating after a change;"
            f" {self.answers} answers compared, {self.accepting} with accepted drafts"
        )


def run(sequence: Sequence, count: Count) -> str | None:
    """Make the changes to a fresh model and compare; what differs, or None."""
    threads = torch.get_num_threads()
    subject = Subject(base(sequence.family, sequence.dtype, sequence.seed % BASES))
    step = "before"
    speculated = native = 0
    try:
        speculative(subject.model)
        compare_answers(subject)
        speculated, native, before = subject.speculated, subject.native, subject.stock
        for step, seed in sequence.steps:
            subject.numbers.seed(seed)
            try:
                CHANGES[step](subject)
            except NotApplicable:
                continue
            except Exception as error:
                if is_ours(error):
                    raise
        step = "after"
        compare_answers(subject, independent=sequence.seed % INDEPENDENT == 0)
        if before.difference(subject.stock) is not None:
            count.altered.update(name for name, _ in sequence.steps[-1:])
    except Exception as error:
        return f"{step}: {type(error).__name__}: {error}"
    finally:
        for undo in reversed(subject.restore):
            undo()
        torch.set_num_threads(threads)
        count.sequences += 1
        count.speculating += subject.speculated > speculated
        count.answers += subject.answers
        count.accepting += subject.speculated
        count.begun += native
        count.native += subject.native > native
    return None


def is_ours(error: BaseException) -> bool:
    """Whether an error came through the product; otherwise a library refuses the change on top of others."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) or any(str(ROOT / "runtime") in frame.filename for frame in frames)


def shortened(sequence: Sequence) -> Sequence:
    """The sequence without the steps that it fails without."""
    steps = list(sequence.steps)
    for index in reversed(range(len(steps))):
        fewer = replace(sequence, steps=tuple(steps[:index] + steps[index + 1 :]))
        if run(fewer, Count()) is not None:
            del steps[index]
    return replace(sequence, steps=tuple(steps))
