"""`Waves`: answers every prompt's first turn, then every second turn and so on, divided over the processes.

Each finished batch is a shard on disk before its wave ends, and every process reads the answers it needs from there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        num_tokens, start, pace = 0, time.perf_counter(), ""
        names, hidden = list(batches), self.rank != 0 or not self.progress
        firsts, longest = range(0, len(names), self.world_size), self.answerer.options.max_new_tokens
        # The bar also moves within a batch, which may take minutes, but not with every token: a file may hold it.
        options = {"unit": "batch", "disable": hidden, "miniters": 0, "mininterval": 1}
        with tqdm(total=len(firsts), desc=f"wave {wave}", **options) as bar:

            def told(number: int) -> None:
                bar.set_postfix_str(f"{pace}token {number} of {longest}", refresh=False)
                bar.update(0)

            for first in firsts:
                turn = names[first : first + self.world_size]  # a batch for each process; the last turn may be short
                name, mine = (turn[self.rank], True) if self.rank < len(turn) else (turn[0], False)
                missing = mine and self.shards.read(batches[name], name=name) is None
                if missing or (self.answerer.together and self._any_missing(turn, batches)):
                    responses = self.answerer.answer(batches[name], name=name, told=None if hidden else told)
                    if missing:
                        self.shards.write(batches[name], responses, name=name, wave=wave)
                    num_tokens += sum(map(len, responses))
                    pace = f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s, "
                    bar.set_postfix_str(pace.removesuffix(", "), refresh=False)
                bar.update()

    def _any_missing(self, turn: Sequence[str], batches: dict[str, list[Turn]]) -> bool:
        """Whether any shard is missing; the same on all processes, since none is written before all have answered."""
        return any(self.shards.read(batches[name], name=name) is None for name in turn)
