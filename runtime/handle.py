"""`SpecBound`: what `model.specbound` is, the adapter at work on one model. Knows no loop of `generate`."""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

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
from runtime.exact.fingerprint import settings, structure, tensors
from runtime.exact.packed import PackedLinears, pack_in_place
from runtime.exact.probe import certify
from runtime.exact.running import why_stock
from runtime.exact.static import StaticCache, addresses, why_not
from runtime.stats import SpeculationStats

logger = logging.getLogger(__name__)

EXACTNESS = ("bitwise", "batched")
_KEPT: Any = object()


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
        self._disabled = 0
        self.source: tuple[str, str | None] | None = None
        self._lock = threading.Lock()
        self._generating: Counter[int] = Counter()  # plain calls by thread
        self._speculating = False
        self._warned: set[str] = set()
        self._forget()
        self._addresses: tuple[int, ...] = ()

    def _forget(self) -> None:
        """Nothing that was found out about the model holds any more."""
        self._structure: tuple[Any, ...] = ()
        self._tensors: tuple[Any, ...] = ()
        self._stock: str | None = None
        self._drafter_on: Any = None
        self._certified_for: tuple[object, ...] = ()
        self._certified_width = 0

    @property
    def enabled(self) -> bool:
        """Whether `generate` speculates; not while `disabled` is open anywhere."""
        return self._disabled == 0

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Switch speculation on or off for good; `disabled` does so for a while."""
        self._disabled = 0 if value else 1

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the lock, and what belongs to the weights where they lie now."""
        state = self.__dict__ | {"packed": None, "static": None, "_speculating": False, "_generating": Counter()}
        state |= {"_structure": (), "_tensors": (), "_certified_for": (), "_drafter_on": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def prepare(self, model: PreTrainedModel) -> tuple[ExecutionPolicy, SpeculationBounds]:
        """How to run and how far to draft on the model as it is now; probes it where that was not done yet.

        Bits depend on the code that runs, weights, device, dtype, threads and attention, any of which the user may
        change between calls. Where `why_stock` has a reason, nothing may be drafted.
        """
        self.why_stock(model)
        assert self.certificate is not None
        width = self.bounds.max_draft_tokens + 1
        limit = min(width, self.certificate.max_width) - 1
        return self.certificate.policy, replace(self.bounds, max_draft_tokens=limit)

    def why_stock(self, model: PreTrainedModel) -> str | None:
        """Why the model as it is now must decode by stock's own loop; None where it may speculate, and is ready to."""
        self._look(model)
        if self._stock is None and self._drafter_on is not self.drafter:
            self.drafter = self._drafter_on = self.drafter.on(self.layers)
            pack_in_place(self.drafter.modules)
        if self._stock is None:
            self._certify(model)
            assert self.certificate is not None
            if self.exactness == "bitwise" and not self.certificate.bitwise:
                return f"no way to run blocks keeps every bit on this machine: {self.certificate}"
        return self._stock

    def _look(self, model: PreTrainedModel) -> None:
        """Drop all that was made of the model as it was, where it is not that any more."""
        code = structure(model), settings()
        held = tensors(model)
        if code == self._structure and held == self._tensors and (self.packed is None or self.packed.current()):
            return
        self._forget()
        self.packed = None
        self._structure, self._tensors = code, held
        self._stock = why_stock(model)
        if self._stock is None and len(model_layers := DecoderLayers(model).layers) != self.layers.num_layers:
            self._stock = f"it has {len(model_layers)} layers, its adapter is for {self.layers.num_layers}"
        if self._stock is None:
            self.layers = DecoderLayers(model)

    def _certify(self, model: PreTrainedModel) -> None:
        """Probe the model, or read its certificate, where that was not done for it as it is."""
        width = self.bounds.max_draft_tokens + 1
        static = self._may_be_static(model)
        now = (self.exactness, static)
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
        """While open, these stand in the place of the handle's own; afterwards all is as before."""
        given = {"bounds": bounds, "drafter": drafter, "controller": controller, "exactness": exactness}
        if exactness is not _KEPT and exactness not in EXACTNESS:
            raise ConfigError(f"exactness is {exactness!r}: expected one of {', '.join(EXACTNESS)}")
        before = {name: getattr(self, name) for name in given}
        self.__dict__.update({name: value for name, value in given.items() if value is not _KEPT})
        try:
            yield
        finally:
            self.__dict__.update(before)

    @contextmanager
    def exclusive(self, *, speculating: bool) -> Iterator[None]:
        """Hold the model: while it speculates, its modules run blocks their own way, so nobody else may use them.

        Plain calls may run beside one another, in one thread or many, as stock's do.

        Raises:
            SpecBoundError: a call speculates already, or this one would while another thread generates.
        """
        me = threading.get_ident()
        with self._lock:
            others = any(thread != me for thread in self._generating)
            if self._speculating or (speculating and others):
                raise SpecBoundError(
                    "this model is generating already: give each thread its own model, or call generate again after"
                    " it returns"
                )
            self._speculating = speculating
            self._generating[me] += 1
        try:
            yield
        finally:
            with self._lock:
                self._speculating = False
                self._generating -= Counter([me])

    def warn_plain(self, reason: str) -> None:
        """Say once why a call runs as plain decoding."""
        self._warn(f"plain decoding for this call, because {reason}")

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("SpecBound: %s.", what)
