"""`SpecBound`: what `model.specbound` is, the adapter at work on one model. Knows no loop of `generate`."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from runtime.adapter.config import SpecBoundConfig
from runtime.adapter.identity import base_fingerprint
from runtime.decoding.cache import KVCache
from runtime.decoding.draft import Drafter
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import ConfigError, SpecBoundError
from runtime.exact.certificate import Certificate
from runtime.exact.execution import ExecutionPolicy
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import certify
from runtime.exact.static import StaticCache, addresses, why_not
from runtime.stats import SpeculationStats

logger = logging.getLogger(__name__)

EXACTNESS = ("bitwise", "batched")


class SpecBound:
    """What `model.specbound` is: the adapter at work on one model.

    Attributes:
        config: what the adapter's `config.json` says; None where a drafter was attached by hand.
        bounds: may be replaced between calls.
        certificate: what the exactness probe checked and found; None before it ran.
        packed: copies of the Linears that run in another layout; None where nothing is packed.
        graphs: run layers as CUDA graphs over a static cache, where `exactness` allows it.
        static: that cache, one for all calls; None where it is not in use.
        source: adapter and revision, where `custom_generate` loaded it; None where `load_specbound` did.
        controller: rests where speculation does not pay; None speculates always, and reproducibly so.
        stats: counts of the last `generate` call that speculated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter,
        bounds: SpeculationBounds,
        *,
        exactness: str = "bitwise",
        graphs: bool = False,
        config: SpecBoundConfig | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if exactness not in EXACTNESS:
            raise ConfigError(f"exactness is {exactness!r}: expected one of {', '.join(EXACTNESS)}")
        self.layers = DecoderLayers(model)
        self.drafter = drafter
        self.bounds = bounds
        self.exactness = exactness
        self.config = config
        self.fingerprint = fingerprint or base_fingerprint(model)
        self.certificate: Certificate | None = None
        self.packed: PackedLinears | None = None
        self.graphs = graphs
        self.static: StaticCache | None = None
        self.controller: Controller | None = None
        self.stats = SpeculationStats()
        self.enabled = True
        self.source: tuple[str, str | None] | None = None
        self._lock = threading.RLock()
        self._speculating = False
        self._warned: set[str] = set()
        self._certified_for: tuple[object, ...] = ()
        self._certified_width = 0
        self._addresses: tuple[int, ...] = ()
        self._drafter_on: tuple[object, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` of the model: all but the lock, and what was made for the weights where they lie now."""
        state = self.__dict__ | {"packed": None, "_certified_for": (), "_drafter_on": (), "_speculating": False}
        state["static"] = None
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def prepare(self, model: PreTrainedModel) -> tuple[ExecutionPolicy, SpeculationBounds]:
        """How to run and how far to draft on the model as it is now; probes it where that was not done yet.

        Bits depend on device, dtype, threads and attention, any of which the user may change between calls.
        """
        where = (model.device, model.dtype)
        if where != self._drafter_on:
            self.drafter = self.drafter.on(self.layers)
            self._drafter_on = where
        width = self.bounds.max_draft_tokens + 1
        static = self._may_be_static(model)
        now = (*where, torch.get_num_threads(), model.config._attn_implementation, static)
        if self.packed is not None and not self.packed.current():  # the weights are no longer those copied
            self.packed, self._certified_for = None, ()
        if self.certificate is None or now != self._certified_for or width > self._certified_width:
            packed = self.packed or PackedLinears.of(model)
            self.static = None  # recorded under the policy before
            self.certificate = certify(
                model, self.fingerprint, max_width=width, exactness=self.exactness, packed=packed, static=static
            )
            if static and not self.certificate.policy.static:
                self._warn("no graphs, because on this machine they have other bits; exactness='batched' takes them")
            self.packed = packed if self.certificate.policy.packed_rows else None
            self._certified_for, self._certified_width = now, width
            if self.certificate.max_width < width:
                logger.warning("SpecBound: nothing is drafted on this machine. %s.", self.certificate)
        limit = min(width, self.certificate.max_width) - 1
        return self.certificate.policy, replace(self.bounds, max_draft_tokens=limit)

    def _may_be_static(self, model: PreTrainedModel) -> bool:
        """Whether graphs are asked for and possible; drops those recorded where the weights no longer are."""
        if not self.graphs:
            return False
        reason = why_not(self.layers.layers)
        if reason is not None:
            self._warn(f"no graphs, because {reason}")
        found = addresses(model) if reason is None else ()
        if found != self._addresses:
            self.static, self._addresses = None, found
        return reason is None

    def cache_of(self, prompt: Any, capacity: int) -> KVCache:
        """The cache that decoding goes on with after a prompt, by the certified policy.

        Args:
            prompt: the transformers `DynamicCache` that the prompt's own forward left.
            capacity: positions to make room for.
        """
        if self.certificate is None or not self.certificate.policy.static:
            return KVCache.from_dynamic(prompt, capacity)
        if self.static is None:
            self.static = StaticCache.from_dynamic(prompt, capacity)
        else:
            self.static.fill(prompt, capacity)
        return self.static

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While open, `generate` is plain decoding."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def exclusive(self, *, speculating: bool) -> Iterator[None]:
        """Hold the model: while it speculates, its modules run blocks their own way, so nobody else may use them.

        Plain modes may call `generate` again, as assisted decoding does for its drafts.

        Raises:
            SpecBoundError: another thread generates, or this one does from inside a speculating call.
        """
        if not self._lock.acquire(blocking=False):
            raise SpecBoundError("this model is generating already: give each thread its own model, or wait")
        if self._speculating:
            self._lock.release()
            raise SpecBoundError("this model is generating already: call generate again after it returns")
        self._speculating = speculating
        try:
            yield
        finally:
            self._speculating = False
            self._lock.release()

    def warn_plain(self, reason: str) -> None:
        """Say once why a call runs as plain decoding."""
        self._warn(f"plain decoding for this call, because {reason}")

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("SpecBound: %s.", what)
