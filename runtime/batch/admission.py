"""`Admission`: calls that wait for KV blocks, and which of them begins. Knows no model and no round."""

from collections import deque
from collections.abc import Sequence

from runtime.batch.call import Call
from runtime.batch.memory import KVMemory, rows_of
from runtime.decoding.cache import blocks_of, first_blocks


class Admission:
    """Lets calls begin in the order they came, nobody before another, those that were put out first.

    With `whole` a call takes all its KV blocks when it begins: it is not driven round by round, or its buffers cannot
    grow. Running calls are given the oldest first.

    Args:
        memory: whose KV blocks calls take.
        calls: that wait.
    """

    def __init__(self, memory: KVMemory, calls: deque[Call]) -> None:
        self.memory, self.calls = memory, calls

    def next(self, running: Sequence[Call], *, whole: bool) -> Call | None:
        """The call that has waited longest, where there are KV blocks to begin with, which it takes."""
        if not self.calls:
            return None
        call = self.calls[0]
        blocks = call.first_blocks(whole=whole)
        if self.memory.free < blocks + _reserve(running) or not self.memory.take(blocks):
            return None
        call.blocks = blocks
        return self.calls.popleft()

    def would_begin(
        self, prompt_tokens: int, max_new_tokens: int, drafts: int, running: Sequence[Call], *, whole: bool
    ) -> bool:
        """Whether there are KV blocks for a call of such lengths too, behind those that wait."""
        longest = rows_of(prompt_tokens + max_new_tokens, drafts)
        own = blocks_of(longest) if whole else first_blocks(rows_of(prompt_tokens, drafts), longest)
        before = sum(call.first_blocks(whole=whole) + 1 for call in self.calls)
        return self.memory.free >= before + own + _reserve(running)

    def grow(self, decoding: Sequence[Call], running: list[Call]) -> list[Call]:
        """Take the KV blocks that calls need for the next round, for the oldest first.

        Returns:
            Running calls that were put out for that, who began last first: they wait before all others.
        """
        put_out: list[Call] = []
        for call in decoding:
            while call in running and not call.grow(self.memory):
                last = running.pop()
                last.put_out(self.memory)
                self.calls.appendleft(last)
                put_out.append(last)
        return put_out


def _reserve(running: Sequence[Call]) -> int:
    """KV blocks that stay free when a call begins, so that the others can grow and none is put out at once."""
    return sum(call.may_grow for call in running)
