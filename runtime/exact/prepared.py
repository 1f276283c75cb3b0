"""`PreparedModel`: a model made ready to run blocks with the right bits, and made ready anew when it changes.

Holds what is found out about the model and what is made of it: the certificate, packed copies of weights, the static
cache of graphs, and the lock of a call that drafts. Knows no drafter and no loop of `generate`.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedModel

from runtime.decoding.cache import KVCache
from runtime.decoding.families import family_of, has_windows
from runtime.decoding.layers import DecoderLayers
from runtime.errors import SpecBoundError
from runtime.exact.certificate import Certificate
from runtime.exact.execution import execution, prompt_layers
from runtime.exact.fingerprint import settings, structure, tensors
from runtime.exact.native.prompt import PromptLayers
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import certify
from runtime.exact.running import why_stock
from runtime.exact.static import StaticCache, addresses, why_not

logger = logging.getLogger(__name__)


class PreparedModel:
    """A model, looked at before each call; what no longer holds is made anew.

    Bits depend on the code that runs, weights, device, dtype, threads and attention, any of which the user may change
    between calls.

    Attributes:
        fingerprint: of the base's weights as they were loaded.
        layers: the model's parts as they are now.
        certificate: what the exactness probe checked and found; None before it ran.
        packed: copies of the Linears that run in another layout; None where nothing is packed.
        static: the cache that CUDA graphs run over, one for all calls; None where it is not in use.
        runs: whether its modules compute blocks at this moment.
        graphs: run layers as CUDA graphs, where every bit is kept. Off but for tests and measurements.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.layers = DecoderLayers(model)
        self.certificate: Certificate | None = None
        self.graphs = False
        self.runs = False
        self._lock = threading.Lock()
        self._generating: Counter[int] = Counter()  # plain calls by thread
        self._speculating = False
        self._warned: set[str] = set()
        self._addresses: tuple[int, ...] = ()
        self.static: StaticCache | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop all that was found out about the model, and made of it."""
        self.packed: PackedLinears | None = None
        self.prompts: PromptLayers | None = None
        self._structure: tuple[Any, ...] = ()
        self._tensors: tuple[Any, ...] = ()
        self._why_stock: str | None = None
        self._certified_for: tuple[object, ...] = ()
        self._certified_width = 0

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the lock, and what belongs to the weights where they lie now."""
        state = self.__dict__ | {
            "packed": None,
            "prompts": None,
            "static": None,
            "_speculating": False,
            "_generating": Counter(),
        }
        state |= {"_structure": (), "_tensors": (), "_certified_for": ()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def look(self, model: PreTrainedModel) -> str | None:
        """Drop what was made of the model as it was, where it is not that any more.

        Returns:
            Why it must decode by stock's own loop; None where it may speculate once it is certified.
        """
        code = structure(model), settings()
        held = tensors(model)
        if code == self._structure and held == self._tensors and (self.packed is None or self.packed.current()):
            return self._why_stock
        self._forget()
        self._structure, self._tensors = code, held
        self._why_stock = why_stock(model)
        if self._why_stock is None:
            layers, expected = DecoderLayers(model), self.layers.num_layers
            if layers.num_layers == expected:
                self.layers = layers
            else:
                self._why_stock = f"it has {layers.num_layers} layers, its adapter is for {expected}"
        return self._why_stock

    def certify(self, model: PreTrainedModel, exactness: str, max_width: int) -> Certificate:
        """Probe the model, or read its certificate, where that was not done for it as it is.

        Args:
            exactness: `bitwise` or `batched`.
            max_width: tokens in the widest block.
        """
        static = self._may_be_static(model)
        now = (exactness, static)
        if self.certificate is None or now != self._certified_for or max_width > self._certified_width:
            packed = self.packed or PackedLinears.of(model)
            self.static = None  # recorded under the policy before
            self.certificate = certify(
                model, self.fingerprint, max_width=max_width, exactness=exactness, packed=packed, static=static
            )
            if static and not self.certificate.policy.static:
                self.warn("no graphs, because on this machine they have other bits; exactness='batched' takes them")
            policy = self.certificate.policy
            self.packed = packed if policy.packed_rows else None
            self.prompts = prompt_layers(model, policy, self.packed) if policy.prompts else None
            self._certified_for, self._certified_width = now, max_width
        return self.certificate

    def _may_be_static(self, model: PreTrainedModel) -> bool:
        """Whether graphs are asked for and possible; drops those recorded where the weights no longer are."""
        if not self.graphs:
            return False
        reason = "its layers have windows" if has_windows(model.config) else why_not(self.layers.layers)
        if family_of(model.config).attention is not None:
            reason = "its layers attend row by row"
        elif family_of(model.config).differing:
            reason = "its layers may differ in their heads"
        if reason is not None:
            self.warn(f"no graphs, because {reason}")
        now = addresses(model) if reason is None else ()
        if now != self._addresses:
            self.static, self._addresses = None, now
        return reason is None

    @contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[None]:
        """While open, the model computes blocks as its certificate says."""
        assert self.certificate is not None
        native = None if self.prompts is None else self.prompts.native
        if native is not None:
            native.tables.forget()
        with execution(model, self.certificate.policy, self.packed, native):
            self.runs = True
            try:
                yield
            finally:
                self.runs = False

    def reading(self, whole: int = 0) -> AbstractContextManager[None]:
        """While open, the model's own forward of a prompt runs natively, where its certificate says so.

        Args:
            whole: as `PromptLayers.reading` has it.
        """
        return nullcontext() if self.prompts is None else self.prompts.reading(whole)

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

    def warn(self, what: str) -> None:
        """Say it once."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("SpecBound: %s.", what)
