"""The methods that a benchmark compares on one model: those of transformers, and SpecBound with various drafters.

Each method has its own controller, so that it does not adapt to the rounds of another.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from runtime.decoding.drafter import HeadDrafter
from runtime.drafting.controller import Controller
from runtime.drafting.policy import SpeculationBounds
from runtime.drafting.temperature import TemperatureSchedule
from runtime.errors import ConfigError
from runtime.handle import SpecBound
from train.replay.search import OFF

# Usual settings of transformers' own methods: 10 tokens of prompt lookup, as documented; exit after 1/4 of the layers.
LOOKUP_TOKENS = 10
EARLY_EXIT_SHARE = 0.25
# Bounds set by hand, for the paper's policy and for ours. The paper names no values.
HAND_THRESHOLD, HAND_WIDTH, HAND_ALPHA = 0.6, 4, 0.5


@dataclass(slots=True)
class Method:
    """One way to generate.

    Attributes:
        title: a description for the report.
        bounds, drafter: those of SpecBound's loop; without bounds stock `generate` runs.
        controller: decides when to speculate; None always speculates.
        options: passed to `generate` with the caller's.
    """

    title: str
    bounds: SpeculationBounds | None = None
    drafter: Any = None
    controller: Controller | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def generate(self, model: Any, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
        """Call the model's `generate` on one prompt of shape [1, T]."""
        specbound: SpecBound = model.specbound
        if self.bounds is None:
            chosen = specbound.disabled()
        else:
            chosen = specbound.using(bounds=self.bounds, drafter=self.drafter, controller=self.controller)
        with chosen:
            output: torch.Tensor = model.generate(prompt, **self.options, **options)
            return output


def make_methods(model: Any, names: Sequence[str]) -> dict[str, Method]:
    """Make the methods with these names, for a model as `load_specbound` returns it.

    Raises:
        ConfigError: a name is unknown.
    """
    require_known(names)
    specbound: SpecBound = model.specbound
    specbound.prepare(model)  # so that the drafter is on the model's device
    methods = {name: METHODS[name](specbound) for name in names}
    own = specbound.bounds
    widest = max((one.bounds.max_draft_tokens for one in methods.values() if one.bounds), default=0)
    with specbound.using(bounds=replace(own, max_draft_tokens=max(widest, own.max_draft_tokens))):
        specbound.prepare(model)  # all methods then use the same certificate
    return methods


def require_known(names: Iterable[str]) -> None:
    """Raise a ConfigError if a name is not in `METHODS`."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method {name!r} is unknown: expected some of {', '.join(METHODS)}")


def _stock(specbound: SpecBound) -> Method:
    return Method("transformers' generate")


def _plain(specbound: SpecBound) -> Method:
    return Method("our loop, nothing drafted", SpeculationBounds(OFF, 0, 0), specbound.drafter)


def _specbound(specbound: SpecBound) -> Method:
    return Method("the adapter as it is", specbound.bounds, specbound.drafter, Controller())


def _steady(specbound: SpecBound) -> Method:
    return Method("the adapter, speculating always", specbound.bounds, specbound.drafter)


def _heads(specbound: SpecBound) -> Method:
    bounds = replace(specbound.bounds, exit_thresholds={**specbound.bounds.exit_thresholds, 0: OFF})
    return Method("exit heads alone", bounds, specbound.drafter, Controller())


def _lookup(specbound: SpecBound) -> Method:
    off = {layer: OFF for layer in specbound.drafter.exit_layers if layer > 0}
    bounds = replace(specbound.bounds, exit_thresholds={**specbound.bounds.exit_thresholds, **off})
    return Method("lookup alone", bounds, specbound.drafter, Controller())


def _hand(specbound: SpecBound) -> Method:
    deepest = max(specbound.drafter.exit_layers)
    bounds = SpeculationBounds(HAND_THRESHOLD, deepest, HAND_WIDTH)
    return Method(f"bounds set by hand: tau {HAND_THRESHOLD}, every exit", bounds, specbound.drafter, Controller())


def _paper(specbound: SpecBound) -> Method:
    drafter: HeadDrafter = specbound.drafter  # type: ignore[assignment]
    layers = drafter.heads.exit_layers
    linear = TemperatureSchedule.linear(HAND_ALPHA, layers, specbound.prepared.layers.num_layers)
    bounds = SpeculationBounds(HAND_THRESHOLD, max(layers), HAND_WIDTH)
    title = f"the paper's policy: linear temperatures (alpha {HAND_ALPHA}), one tau, heads alone"
    return Method(title, bounds, replace(drafter, temperatures=linear, lookup=None))


def _fixed_exit(specbound: SpecBound) -> Method:
    drafter: HeadDrafter = specbound.drafter  # type: ignore[assignment]
    layer = max(drafter.heads.exit_layers)
    thresholds = {other: OFF for other in drafter.heads.exit_layers if other != layer}
    bounds = SpeculationBounds(0.0, layer, HAND_WIDTH, thresholds)
    return Method(f"LayerSkip's policy: {HAND_WIDTH} drafts at layer {layer}", bounds, replace(drafter, lookup=None))


def _prompt_lookup(specbound: SpecBound) -> Method:
    return Method("transformers' prompt lookup", options={"prompt_lookup_num_tokens": LOOKUP_TOKENS})


def _early_exit(specbound: SpecBound) -> Method:
    layer = max(1, round(specbound.prepared.layers.num_layers * EARLY_EXIT_SHARE))
    return Method(f"transformers' early exit at layer {layer}", options={"assistant_early_exit": layer})


METHODS: dict[str, Callable[[SpecBound], Method]] = {
    "stock": _stock,
    "plain": _plain,
    "specbound": _specbound,
    "steady": _steady,
    "heads": _heads,
    "lookup": _lookup,
    "hand": _hand,
    "paper": _paper,
    "fixed_exit": _fixed_exit,
    "prompt_lookup": _prompt_lookup,
    "early_exit": _early_exit,
}
