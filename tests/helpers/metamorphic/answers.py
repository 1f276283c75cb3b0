"""An answer of a model with its adapter, compared with stock's: ids, logits, cache, random numbers, exception."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from runtime import detach
from runtime.decoding.families import CACHE
from tests.helpers.metamorphic.subject import Coached, Subject

PROMPT = torch.tensor([[5, 17, 33, 8, 5, 17, 60]])
NEW_TOKENS = 14


class Differs(AssertionError):
    """An answer is not stock's."""


class Interruption(Exception):
    """What the streamer below raises."""


class Interrupting(BaseStreamer):
    """A streamer that raises at some token."""

    def __init__(self, stop_after: int) -> None:
        self.left = stop_after

    def put(self, value: torch.Tensor) -> None:
        """Count."""
        self.left -= 1
        if self.left < 0:
            raise Interruption

    def end(self) -> None:
        """Nothing."""


@dataclass
class Outcome:
    """All that a caller gets of one call, by name."""

    parts: dict[str, Any]

    def difference(self, other: "Outcome") -> str | None:
        """Names of the parts that differ in some bit; None where all are equal."""
        names = sorted(self.parts.keys() | other.parts.keys())
        differing = [name for name in names if not _same(self.parts.get(name), other.parts.get(name))]
        return (
            ", ".join(
                f"{name} ({_shown(self.parts, name)}, stock {_shown(other.parts, name)})" for name in differing[:3]
            )
            or None
        )


def _same(mine: Any, stock: Any) -> bool:
    if not isinstance(mine, torch.Tensor) or not isinstance(stock, torch.Tensor):
        return type(mine) is type(stock) and bool(mine == stock)
    if mine.dtype != stock.dtype or mine.shape != stock.shape:
        return False
    return torch.allclose(mine, stock, rtol=0.0, atol=0.0, equal_nan=True)


def _shown(parts: dict[str, Any], name: str) -> str:
    value = parts.get(name)
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return str(value.flatten()[len(PROMPT[0]) :].tolist()) if name == "ids" else f"shape {list(value.shape)}"


def outcome(model: Any, *, prefix: int = 0, stop_after: int | None = None, **options: Any) -> Outcome:
    """Call `generate` with a cache of the caller's own and gather what came of it."""
    cache = DynamicCache()
    parts: dict[str, Any] = {}
    torch.manual_seed(11)
    if stop_after is not None:
        options["streamer"] = Interrupting(stop_after)
    settings = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, CACHE: cache}
    settings |= {"attention_mask": torch.ones_like(PROMPT)}
    if getattr(model.generation_config, "max_new_tokens", None) is None:
        settings["max_new_tokens"] = NEW_TOKENS
    try:
        if prefix:
            with torch.no_grad():
                model(PROMPT[:, :prefix], use_cache=True, **{CACHE: cache})
        output = model.generate(PROMPT, **settings | options)
        parts["ids"] = output.sequences
        parts |= {f"logits {index}": logits for index, logits in enumerate(output.logits or ())}
    except Exception as error:
        parts["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    parts["random numbers"] = torch.get_rng_state()
    for index, layer in enumerate(cache.layers):
        if layer.keys is not None:
            parts |= {f"keys {index}": layer.keys.clone(), f"values {index}": layer.values.clone()}
    return Outcome(parts)


def _copy(model: Any) -> Any:
    """The model without its adapter; None where torch copies no such weights, or copies them into others."""
    try:
        assert all(parameter._version >= 0 for parameter in model.parameters())
        return detach(copy.deepcopy(model))
    except RuntimeError as error:
        if "deepcopy protocol" in str(error) or "version counter" in str(error):
            return None
        raise


def compare_answers(subject: Subject, *, independent: bool = False, **options: Any) -> None:
    """Raise Differs unless the model answers as stock does.

    Args:
        independent: stock is a copy without an adapter, not the same model with it disabled.
        options: as `outcome` takes them.
    """
    with subject.model.specbound.disabled():
        stock = outcome(subject.model, **options)
    if independent and (untouched := _copy(subject.model)) is not None:
        difference = outcome(untouched, **options).difference(stock)
        if difference is not None:
            raise Differs(f"disabled() is not stock: {difference}")
    ids = stock.parts.get("ids")
    Coached.truth = [] if ids is None else ids[0].tolist()
    before = subject.model.specbound.stats
    mine = outcome(subject.model, **options)
    stats, certificate = subject.model.specbound.stats, subject.model.specbound.certificate
    accepted = stats is not before and stats.accepted.total() > 0
    subject.answers += 1
    subject.speculated += accepted
    subject.native += accepted and "layers native" in str(certificate)
    subject.stock = stock
    difference = mine.difference(stock)
    if difference is not None:
        raise Differs(difference)
