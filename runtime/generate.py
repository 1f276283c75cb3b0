"""Binds the decoding loop to transformers' `generate`: its processors, criteria, streamers and outputs.

`generate` itself stays transformers' own. Its greedy and sampling loop, `_sample`, is overridden in a subclass
that the model becomes an instance of, so everything `generate` prepares (masks, cache, processors, stop strings,
length limits) is stock's. Calls that speculation cannot honour bit for bit, and the modes that have loops of their
own (beam search, assisted decoding), run stock's loop, with one warning. Knows nothing of files.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from runtime.batch.generation import Generation, position_after
from runtime.batch.reading import PromptReading
from runtime.batch.waiting import Waiting, stock_class
from runtime.decoding.emitter import TargetEmitter
from runtime.decoding.families import CACHE, has_windows, layers_with_keys
from runtime.decoding.rounds import run_to_end
from runtime.decoding.wrappers import prompt_arguments
from runtime.errors import SpecBoundError
from runtime.exact.fingerprint import STOCK
from runtime.exact.running import unknown_version
from runtime.handle import STREAM, SpecBound

logger = logging.getLogger(__name__)

# Loops of `generate` other than `_sample`, which is greedy decoding and sampling.
PLAIN_MODES = {"_beam_search": "beam search", "_assisted_decoding": "assisted decoding"}

SEVERAL = "it decodes several sequences at once: model.generate_batch speculates on each, with the ids it has alone"

# What plain decoding of text passes to the base's forward, and what `generate` adds that the forward ignores; any
# other argument may change what layers compute.
KNOWN_ARGUMENTS = {
    "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds", "tokenizer",
    "assistant_tokenizer",
}  # fmt: skip


def attach(model: Any, specbound: SpecBound) -> PreTrainedModel:
    """Make `model.generate` speculate; the model stays an instance of its own class.

    Raises:
        SpecBoundError: where an adapter is attached already.
    """
    if hasattr(model, "specbound"):
        raise SpecBoundError("this model already has an adapter: call runtime.detach(model) first")
    if not any(STOCK in kind.__dict__ for kind in type(model).__mro__):  # one class of ours under a user's is enough
        model.__class__ = speculating(type(model))  # type: ignore[arg-type]
    model.specbound = specbound
    specbound.belong_to(model)
    attached: PreTrainedModel = model
    return attached


@cache
def speculating(stock: type) -> type:
    """The subclass of a model's class whose loops are ours; one for all models of that class."""
    # The name, module and signature stay the base's: transformers looks models up by them.
    namespace: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
    }
    namespace |= {STOCK: stock, "_sample": _sample, "__reduce_ex__": _reduce, "generate_batch": _generate_batch}
    namespace |= {"__setstate__": _restore, STREAM: _stream}
    namespace |= {name: _plain_mode(name, mode) for name, mode in PLAIN_MODES.items()}
    return type(stock.__name__, (stock,), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickles and copies, which find classes by name: the stock class, made speculating again.

    A class that a user made of ours is found by its own name.

    Raises:
        SpecBoundError: it runs blocks now, so its modules are not what they are between calls.
    """
    specbound: SpecBound | None = self.__dict__.get("specbound")
    if specbound is not None and specbound.prepared.runs:
        raise SpecBoundError("this model is generating: copy or pickle it when generate has returned")
    if STOCK not in type(self).__dict__:
        return object.__reduce_ex__(self, protocol)  # type: ignore[return-value]
    return _rebuild, (stock_class(self),), self.__dict__


def _restore(self: Any, state: dict[str, Any]) -> None:
    """Of a copy or a pickle: its adapter is at work on it, not on the model it came from."""
    stock_class(self).__setstate__(self, state)
    if "specbound" in self.__dict__:
        self.specbound.belong_to(self)


def _rebuild(stock: Any) -> Any:
    """An empty model of the speculating class."""
    model = stock.__new__(stock)
    model.__class__ = speculating(stock)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`: the model is what it was; one of a class that a user made of ours keeps that."""
    if hasattr(model, "specbound"):
        del model.specbound
        if STOCK in type(model).__dict__:
            model.__class__ = stock_class(model)
    return model


@torch.no_grad()
def _sample(
    self: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Greedy and sampled decoding of `generate`, with speculation where it keeps every bit."""
    given = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
    stock = partial(stock_class(self)._sample, self, *given)
    specbound: SpecBound | None = getattr(self, "specbound", None)
    if specbound is None:
        return stock(**model_kwargs)  # type: ignore[no-any-return]
    reason = unknown_version() or _plain_reason(self, input_ids, generation_config, synced_gpus, model_kwargs)
    if isinstance(streamer, Waiting):
        return streamer.take(given, model_kwargs, reason)  # type: ignore[return-value]
    if specbound.enabled and reason is None:
        with specbound.prepared.exclusive(speculating=True):
            reason = specbound.why_stock(self)
            if reason is None:
                emitter = TargetEmitter(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
                return _speculate(self, specbound, emitter, generation_config, model_kwargs)
    if specbound.enabled:
        specbound.warn_plain(str(reason))
    with specbound.prepared.exclusive(speculating=False):
        return stock(**model_kwargs)  # type: ignore[no-any-return]


def _generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own continuous batching, run by ours: see `runtime.batch.many`."""
    if getattr(self, "specbound", None) is None:
        return stock_class(self).generate_batch(self, *args, **kwargs)
    from runtime.batch.many import generate_batch  # with it comes transformers' own continuous batching

    return generate_batch(self, *args, **kwargs)


def _stream(self: Any, requests: Any, **options: Any) -> Any:
    """See `runtime.batch.feed`."""
    from runtime.batch.feed import stream

    return stream(self, requests, **options)


def _plain_mode(name: str, mode: str) -> Callable[..., Any]:
    """Stock's loop of that name, and one warning."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        specbound: SpecBound | None = getattr(self, "specbound", None)
        if specbound is None:
            return getattr(stock_class(self), name)(self, *args, **kwargs)
        if specbound.enabled:
            specbound.warn_plain(f"it asks for {mode}")
        with specbound.prepared.exclusive(speculating=False), specbound.disabled():
            return getattr(stock_class(self), name)(self, *args, **kwargs)

    return run


def _speculate(
    model: Any,
    specbound: SpecBound,
    emitter: TargetEmitter,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    """Prompt through the stock forward, then rounds; what plain `generate` returns comes back."""
    given = emitter.input_ids, generation_config, model_kwargs
    reading = PromptReading(model, specbound.prepared, specbound.drafter.watched, given, None)
    reading.go_on()
    generation = Generation.of(specbound, emitter, reading, specbound.certified_bounds)
    specbound.stats = generation.request.stats
    try:
        with specbound.prepared.running(model):
            run_to_end(generation.request, generation.prompt_logits, specbound.drafter, specbound.controller)
    finally:
        generation.leave_cache()
    return generation.finish()


def _plain_reason(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why this call cannot speculate and keep every bit; None if it can."""
    cache = model_kwargs.get(CACHE)
    given = {key for key, value in model_kwargs.items() if value is not None}
    unknown = given - KNOWN_ARGUMENTS - prompt_arguments(model.config)
    embeds = model_kwargs.get("inputs_embeds")
    if (input_ids if embeds is None else embeds).shape[0] != 1:
        return SEVERAL
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        return "its attention mask has holes"
    if unknown:
        return f"it passes {', '.join(sorted(unknown))} to the model"
    if not model_kwargs.get("use_cache") or type(cache) is not DynamicCache or cache.offloading:
        return "it does not use the default dynamic cache"
    keyed = cache.layers[: layers_with_keys(model.config)]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in keyed):
        return "its cache has layers that are not of attention"
    positions = model_kwargs.get("position_ids")
    if positions is not None and position_after(positions) is None:
        return "its prompt ends inside an image, where positions run along several axes"
    if has_windows(model.config) != any(cache.is_sliding):
        return "its cache has other windows than the model"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "it asks for attentions or hidden states"
    if synced_gpus:
        return "synced_gpus keeps several processes in step"
    if model.training or torch.is_autocast_enabled(model.device.type):
        return "the model is in training mode or under autocast"
    return None
