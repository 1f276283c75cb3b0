"""Calls of `write` that run together in a batch. Knows no server and no terminal."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from runtime.batch.call import Call
from runtime.batch.calls import Batch
from runtime.stats import SpeculationStats
from runtime.text.transcript import Transcript, Written, finish_reason


def join(
    batch: Batch,
    prompt: Tensor,
    transcript: Transcript,
    *,
    seed: int | None = None,
    speculate: bool = True,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> Call:
    """Add a call to a batch that writes into a transcript; arguments are those of `write`.

    Without a seed it has one of its own, so that nobody's numbers depend on who runs beside it.
    """
    seed = secrets.randbits(63) if seed is None else seed
    return batch.add(prompt, seed=seed, speculate=speculate, **transcript.arguments(prompt, processors), **options)


def outcome(batch: Batch, call: Call, transcript: Transcript) -> Written:
    """What `write` returns, of a call that has ended without an error."""
    reason = finish_reason(batch.model, transcript)
    if call.stats is not None and call.speculate:
        return Written(reason, call.stats, True)
    seconds, reused = time.perf_counter() - call.added, call.stats.reused if call.stats is not None else 0
    return Written(reason, SpeculationStats(emitted=len(transcript.ids), reused=reused, seconds=seconds), False)
