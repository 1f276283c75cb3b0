"""`SpecBound`: what `model.specbound` is, the adapter at work on one model. Knows no loop of `generate`."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from runtime.adapter.config import SpecBoundConfig
from runtime.adapter.identity import base_fingerprint
from runtime.decoding.drafter import Drafter, HeadDrafter
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import ConfigError, SpecBoundError, UnsupportedModel
from runtime.exact.certificate import Certificate
from runtime.exact.native.heads import native_heads
from runtime.exact.packed import pack_in_place
from runtime.exact.prepared import PreparedModel
from runtime.stats import SpeculationStats

# What a model with an adapter streams requests by: the loop lies above this file.
STREAM = "_specbound_stream"
EXACTNESS = ("bitwise", "batched")
_KEPT: Any = object()


class SpecBound:
    """What `model.specbound` is: the adapter at work on one model.

    Attributes:
        config: what the adapter's `config.json` says; None where a drafter was attached by hand.
        drafter: makes the drafts; may be replaced between calls.
        bounds: how far it drafts; may be replaced between calls.
        controller: rests where speculation does not pay, and learns it once for all calls and batches; None speculates
            always, and reproducibly so.
        exactness: `bitwise` or `batched`.
        stats: counts of the last `generate` call that speculated.
        source: adapter and revision, where `custom_generate` loaded it; None where `load_specbound` did.
        prepared: the model made ready to run blocks; not for users.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        bounds: SpeculationBounds,
        *,
        exactness: str = "bitwise",
        config: SpecBoundConfig | None = None,
        fingerprint: str | None = None,
    ) -> None:
        require_exactness(exactness)
        self.drafter = drafter
        self.bounds = bounds
        self.exactness = exactness
        self.config = config
        self.controller: Controller | None = None
        self.stats = SpeculationStats()
        self.source: tuple[str, str | None] | None = None
        self.prepared = PreparedModel(model, fingerprint or base_fingerprint(model))
        self._ready: tuple[Any, Any] = (None, None)  # the drafter, and the layers that it was made ready for
        self._disabled = 0
        self._lock = threading.Lock()
        self.belong_to(model)

    @property
    def certificate(self) -> Certificate | None:
        """What the exactness probe checked and found; None before it ran."""
        return self.prepared.certificate

    @property
    def enabled(self) -> bool:
        """Whether `generate` speculates; not while `disabled` is open anywhere."""
        return self._disabled == 0

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Switch speculation on or off for good; `disabled` does so for a while."""
        self._disabled = 0 if value else 1

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the lock."""
        state = self.__dict__ | {"_ready": (None, None), "_model": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def belong_to(self, model: PreTrainedModel) -> None:
        """Note which model it is at work on, without keeping that alive; not for users."""
        self._model: weakref.ref[PreTrainedModel] | None = weakref.ref(model)

    def stream(self, requests: Iterable[Any], **options: Any) -> Iterator[Any]:
        """Decode requests together as they are fed, each with the ids that `generate` gives it alone.

        Args:
            requests: each the ids of a prompt, or a dictionary of `input_ids` and the request's own options of
                `generate`, `seed` among them; None where there is none at the moment.
            options: `max_requests`, that decode together.

        Returns:
            An iterator of `runtime.batch.Piece`: a request's number, its new ids, whether it has ended, and why
            where it failed. The model belongs to it until it ends or is closed.

        Raises:
            SpecBoundError: it is attached to no model.
        """
        model = None if self._model is None else self._model()
        if not hasattr(model, STREAM):
            raise SpecBoundError("this adapter is at work on no model: load one with load_specbound")
        streamed: Iterator[Any] = getattr(model, STREAM)(requests, **options)
        return streamed

    def prepare(self, model: PreTrainedModel) -> SpeculationBounds:
        """Get ready for the model as it is now, probing it where that was not done yet; how far it may draft."""
        self.why_stock(model)
        return self.certified_bounds

    @property
    def certified_bounds(self) -> SpeculationBounds:
        """The bounds, rounds no wider than the certificate allows."""
        widest = 1 if self.certificate is None else self.certificate.max_width
        return replace(self.bounds, max_draft_tokens=min(self.bounds.max_draft_tokens + 1, widest) - 1)

    def why_stock(self, model: PreTrainedModel) -> str | None:
        """Why the model as it is now must decode by stock's own loop; None where it may speculate, and is ready to."""
        reason = self.prepared.look(model)
        if reason is not None:
            return reason
        layers = self.prepared.layers
        if self._ready[0] is not self.drafter or self._ready[1] is not layers:
            self.drafter = _fast(self.drafter.on(layers))
            self._ready = self.drafter, layers
        try:
            certificate = self.prepared.certify(model, self.exactness, self.bounds.max_draft_tokens + 1)
        except UnsupportedModel as error:
            return str(error)
        if self.exactness == "bitwise" and not certificate.bitwise:
            return f"no way to run blocks keeps every bit on this machine: {certificate}"
        return None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While open, `generate` is plain decoding."""
        with self._lock:
            self._disabled += 1
        try:
            yield
        finally:
            with self._lock:
                self._disabled -= 1

    @contextmanager
    def using(
        self,
        *,
        bounds: SpeculationBounds = _KEPT,
        drafter: Drafter = _KEPT,
        controller: Controller | None = _KEPT,
        exactness: str = _KEPT,
    ) -> Iterator[None]:
        """While open, these stand in the place of the handle's own; afterwards all is as before.

        Raises:
            ConfigError: exactness is not a known one.
        """
        pairs = (("bounds", bounds), ("drafter", drafter), ("controller", controller), ("exactness", exactness))
        given: dict[str, Any] = {name: value for name, value in pairs if value is not _KEPT}
        require_exactness(given.get("exactness", self.exactness))
        before = {name: getattr(self, name) for name in given}
        self.__dict__.update(given)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def warn_plain(self, reason: str) -> None:
        """Say once why a call runs as plain decoding."""
        self.prepared.warn(f"plain decoding for this call, because {reason}")


def require_exactness(exactness: str) -> None:
    """Raise ConfigError where it is not one of the modes."""
    if exactness not in EXACTNESS:
        raise ConfigError(f"exactness is {exactness!r}: expected one of {', '.join(EXACTNESS)}")


def _fast(drafter: Drafter) -> Drafter:
    """The drafter, its heads in our own kernel, or their Linears packed where they cannot be."""
    if isinstance(drafter, HeadDrafter):
        drafter = replace(drafter, heads=native_heads(drafter.heads))
        if len(drafter.heads.native) == len(drafter.heads.exit_layers):
            return drafter
    pack_in_place(drafter.modules)
    return drafter
