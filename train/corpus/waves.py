"""`Waves`: answers every prompt's first turn, then every second turn and so on, divided over the processes.

Each finished batch is a shard on disk before its wave ends, and every process reads the answers it needs from there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from runtime.errors import DataError
from runtime.text.prompts import Prompt
from train.corpus.answers import Answerer, Pending, Turn
from train.corpus.shards import Shards


@dataclass(frozen=True, slots=True)
class Waves:
    """Turns of all prompts, wave by wave, divided over the processes."""

    answerer: Answerer
    shards: Shards
    rank: int
    world_size: int
    barrier: Callable[[], object]
    progress: bool

    def run(self, prompts: Sequence[Prompt]) -> tuple[list[pa.Table], int]:
        """Answer every turn. Returns the rows (all of them on rank 0) and the number of turns that are too long."""
        pending: list[Pending] = [(prompt, prompt.messages) for prompt in prompts]
        tables: list[pa.Table] = []
        num_too_long = wave = 0
        while pending:
            named = enumerate(self.answerer.batches(pending))
            batches = {f"wave-{wave}-batch-{index:05d}": batch for index, batch in named}
            num_too_long += len(pending) - sum(map(len, batches.values()))
            self._answer(batches, wave=wave)
            self.barrier()
            pending = []
            for name, batch in batches.items():
                if self.rank != 0 and all(len(turn.prompt.later_turns) <= wave for turn in batch):
                    continue  # only rank 0 needs the answers without a next turn
                table = self.shards.read(batch, name=name)
                if table is None:
                    raise DataError(
                        f"{self.shards.folder}: {name}.parquet is not there or damaged after its wave;"
                        " every process must see the same folder; run again to continue"
                    )
                tables.append(table)
                responses = table["response_ids"].to_pylist()
                pending += self.answerer.next_turns(batch, responses, wave=wave)
            wave += 1
        return tables, num_too_long

    def _answer(self, batches: dict[str, list[Turn]], *, wave: int) -> None:
        """Answer this process's batches that are not on disk."""
        todo = self._todo(batches)
        hidden = self.rank != 0 or not self.progress
        there = sum(len(batches[name]) for name in list(batches)[self.rank :: self.world_size] if name not in todo)
        total = there + sum(len(batches[name]) for name in todo)
        # The bar also moves within a batch, which may take minutes, but not with every token: a file may hold it.
        options = {"unit": "answer", "disable": hidden, "miniters": 0, "mininterval": 1}
        with tqdm(total=total, initial=there, desc=f"wave {wave}", **options) as bar:

            def done(name: str, responses: list[list[int]]) -> None:
                if todo[name]:
                    self.shards.write(batches[name], responses, name=name, wave=wave)

            self.answerer.answer_all({name: batches[name] for name in todo}, done, None if hidden else _Pace(bar).told)

    def _todo(self, batches: dict[str, list[Turn]]) -> dict[str, bool]:
        """Names of batches that this process must answer, and whether it writes them.

        Processes that share a base answer equally often: no shard is written before all of them know what is missing.
        """
        names, todo = list(batches), dict[str, bool]()
        for first in range(0, len(names), self.world_size):
            turn = names[first : first + self.world_size]  # a batch for each process; the last turn may be short
            name, mine = (turn[self.rank], True) if self.rank < len(turn) else (turn[0], False)
            missing = mine and self._is_missing(name, batches)
            if missing or (self.answerer.together and any(self._is_missing(each, batches) for each in turn)):
                todo[name] = missing
        return todo

    def _is_missing(self, name: str, batches: dict[str, list[Turn]]) -> bool:
        return self.shards.read(batches[name], name=name) is None


@dataclass(slots=True)
class _Pace:
    """Moves a bar, and says how many tokens a second come."""

    bar: Any
    start: float = field(default_factory=time.perf_counter)
    num_tokens: int = 0

    def told(self, responses: Sequence[list[int]], note: str) -> None:
        """Responses have ended, or those that are made have come so far."""
        self.num_tokens += sum(map(len, responses))
        pace = f"{self.num_tokens / (time.perf_counter() - self.start):.0f} tokens/s" if self.num_tokens else ""
        self.bar.set_postfix_str(", ".join(filter(None, (pace, note))), refresh=False)
        self.bar.update(len(responses))
