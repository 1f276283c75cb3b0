"""The audit: the same prompts generated plainly and with SpecBound, and the first divergence of each explained.

A divergence is a *tie* where the two ways computed slightly different logits and that difference is as large as
the margin between the two tokens; anything else is a *defect*. Logits are compared too, bit for bit: where they
are equal, no tie can ever be broken another way. Knows no files.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.batch import Batch


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where one prompt's outputs part.

    Attributes:
        position: index among the new tokens.
        stock_token, specbound_token: what each emitted there; None where it had ended.
        stock_logits, specbound_logits: the target's logits of those two tokens, in that order, as each computed them.
        margin: difference between stock's logits of the two tokens.
        largest_shift: largest difference between the two ways' logits at that position.
        kind: `tie` or `defect`.
    """

    position: int
    stock_token: int | None
    specbound_token: int | None
    stock_logits: tuple[float, float] | None
    specbound_logits: tuple[float, float] | None
    margin: float | None
    largest_shift: float | None
    kind: str


@dataclass(frozen=True, slots=True)
class AuditedPrompt:
    """One prompt.

    Attributes:
        tokens: compared; of the longer output.
        differing: how many of them differ.
        differing_logits: positions up to the first differing token whose logits differ in some bit.
        stock_seconds, specbound_seconds: wall-clock time of each way, the prompt's own forward included; where prompts
            decode together a like share.
        divergence: the first, if any token differs.
    """

    tokens: int
    differing: int
    differing_logits: int
    stock_seconds: float
    specbound_seconds: float
    divergence: Divergence | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def audit(
    model: Any, prompts: Sequence[Tensor], *, seed: int = 0, concurrency: int = 1, **options: Any
) -> Iterator[AuditedPrompt]:
    """Generate from every prompt both ways and compare.

    Args:
        model: as `load_specbound` returns it.
        prompts: token ids, each of shape [1, T], int64.
        seed: torch seed set before each generation, so that sampling draws the same numbers.
        concurrency: prompts that SpecBound decodes together; stock has each of them alone.
        options: passed to `generate` both times.
    """
    options = {**options, "return_dict_in_generate": True, "output_logits": True}
    for first in range(0, len(prompts), concurrency):
        group = prompts[first : first + concurrency]
        with model.specbound.disabled():
            stock = [_alone(model, prompt, seed, options) for prompt in group]
        ours = _together(model, group, seed, options) if concurrency > 1 else [_alone(model, group[0], seed, options)]
        for prompt, (plain, plain_seconds), (found, seconds) in zip(group, stock, ours, strict=True):
            yield _compare(plain, found, prompt.shape[1], {"stock": plain_seconds, "specbound": seconds})


def _alone(model: Any, prompt: Tensor, seed: int, options: dict[str, Any]) -> tuple[Any, float]:
    """What `generate` returns, and its seconds."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    output = model.generate(prompt, **options)
    return output, round(time.perf_counter() - started, 3)


def _together(model: Any, prompts: Sequence[Tensor], seed: int, options: dict[str, Any]) -> list[tuple[Any, float]]:
    """The same of prompts that decode together; raises what any of them raised."""
    started = time.perf_counter()
    with Batch(model, len(prompts)) as batch:
        calls = [batch.add(prompt, seed=seed, **options) for prompt in prompts]
        while not all(call.ended for call in calls):
            batch.round()
    share = round((time.perf_counter() - started) / len(prompts), 3)
    for call in calls:
        if call.error is not None:
            raise call.error
    return [(call.output, share) for call in calls]


def _compare(stock: Any, specbound: Any, prompt_length: int, seconds: dict[str, float]) -> AuditedPrompt:
    ours, theirs = (output.sequences[0, prompt_length:].tolist() for output in (specbound, stock))
    length = max(len(ours), len(theirs))
    differing = [index for index in range(length) if ours[index : index + 1] != theirs[index : index + 1]]
    first = differing[0] if differing else length
    pairs = list(zip(stock.logits, specbound.logits, strict=False))
    same_text = pairs[: first + 1]  # afterwards each way has a text of its own
    return AuditedPrompt(
        tokens=length,
        differing=len(differing),
        differing_logits=sum(not torch.equal(one, other) for one, other in same_text),
        stock_seconds=seconds["stock"],
        specbound_seconds=seconds["specbound"],
        divergence=_explain(stock, specbound, ours, theirs, first) if differing else None,
    )


def _explain(stock: Any, specbound: Any, ours: list[int], theirs: list[int], position: int) -> Divergence:
    if position >= min(len(ours), len(theirs)):  # one of them ended: lengths are decided by ids, never by a tie
        ended = [ids[position] if position < len(ids) else None for ids in (theirs, ours)]
        return Divergence(position, ended[0], ended[1], None, None, None, None, "defect")
    pair = [theirs[position], ours[position]]
    stock_row, our_row = stock.logits[position][0].float(), specbound.logits[position][0].float()
    margin = float(stock_row[pair[0]] - stock_row[pair[1]])
    shift = float((stock_row - our_row).abs().max())
    return Divergence(
        position=position,
        stock_token=pair[0],
        specbound_token=pair[1],
        stock_logits=(float(stock_row[pair[0]]), float(stock_row[pair[1]])),
        specbound_logits=(float(our_row[pair[0]]), float(our_row[pair[1]])),
        margin=margin,
        largest_shift=shift,
        # Two logits that each moved by at most `shift` can change places only within twice that.
        kind="tie" if shift > 0 and abs(margin) <= 2 * shift else "defect",
    )
