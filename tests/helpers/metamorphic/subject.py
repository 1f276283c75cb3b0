"""`Subject`: a tiny model with an adapter attached, and what the changes that tests make to it need to know."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, LlamaConfig, Qwen2Config, Qwen3Config

from runtime import SpeculationBounds, TemperatureSchedule
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.families import NATIVE_SHAPE, SCALED

VOCABULARY = 96
LAYERS = 3
EXITS = [1, 2]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, intermediate_size=64, attention_dropout=0.1),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True),
    "gpt2": GPT2Config(**SHAPE, n_inner=64, embd_pdrop=0.0),
}
# Of sizes that our own kernels take, in bfloat16; between them all that a layer may have in a run, but windows.
UNNAMED: dict[str, Any] = {key: value for key, value in NATIVE_SHAPE.items() if key != "head_dim"}
NATIVE: dict[str, Any] = {
    "native qwen3": Qwen3Config(**NATIVE_SHAPE, attention_bias=True, attention_dropout=0.1),
    "native granite": GraniteConfig(**UNNAMED, **SCALED),
}


class NotApplicable(Exception):
    """A change that cannot be made to this model: it is passed over."""


def base(family: str, dtype: torch.dtype, seed: int) -> Any:
    """A tiny model with random weights, biases, norms and scales."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy((FAMILIES | NATIVE)[family])).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model.to(dtype)


@dataclass
class Coached:
    """A real drafter whose guesses are replaced: the truth two times of three, sure three times of four."""

    heads: HeadDrafter
    truth: ClassVar[list[int]] = []

    @property
    def exit_layers(self) -> list[int]:
        """As the heads have them."""
        return self.heads.exit_layers

    @property
    def modules(self) -> Any:
        """As the heads have them."""
        return self.heads.modules

    @property
    def watched(self) -> Any:
        """As the heads have them."""
        return self.heads.watched

    def on(self, layers: DecoderLayers) -> "Coached":
        """The heads on the base as it is now."""
        return Coached(self.heads.on(layers))

    def propose(self, layer: int, state: Any, nodes: Any, count: int) -> Any:
        """The heads are asked, so that what they do is exercised too."""
        proposed = []
        for node, ((guess, _), *others) in zip(nodes, self.heads.propose(layer, state, nodes, count), strict=True):
            position = state.length + len(state.paths[node])
            correct = self.truth[position] if position < len(self.truth) else guess
            first = (correct if position % 3 else guess), 0.0 if (position + layer) % 4 == 0 else 0.9
            proposed.append([first, *(other for other in others if other[0] != first[0])])
        return proposed


def drafter(model: Any, seed: int = 0) -> Coached:
    """Random heads for the exits, coached."""
    layers = DecoderLayers(model)
    chosen = torch.arange(0, VOCABULARY, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = ExitHeads("deep", EXITS, hidden_size=model.config.hidden_size, draft_vocab_size=len(chosen), rank=8)
    temperatures = TemperatureSchedule.linear(0.5, EXITS, LAYERS)
    made = DraftHeads.of(heads.requires_grad_(False).eval(), layers, chosen)
    return Coached(HeadDrafter(made, temperatures))


def speculative(model: Any) -> Any:
    """The model with coached heads attached."""
    return attach(model, SpecBound(model, drafter(model), SpeculationBounds(0.2, max(EXITS), 3, max_branches=2)))


@dataclass
class Subject:
    """The model under test.

    Attributes:
        model: attached; changes may put another in its place.
        numbers: of the change at work.
        lora: the `PeftModel` around the model; None where there is none.
        handles: of hooks that may be removed again.
        restore: undoes what outlives the model, last first.
        answers: answers compared so far, and how many of them accepted drafts.
        native: how many of these ran in our own kernels.
        stock: what stock answered last.
    """

    model: Any
    numbers: random.Random = field(default_factory=random.Random)
    lora: Any = None
    handles: list[Any] = field(default_factory=list)
    restore: list[Callable[[], Any]] = field(default_factory=list)
    answers: int = 0
    speculated: int = 0
    native: int = 0
    stock: Any = None

    @property
    def body(self) -> Any:
        """What lies below the unembedding."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.body.h if hasattr(self.body, "h") else self.body.layers  # type: ignore[no-any-return]

    def noise(self, like: torch.Tensor, scale: float = 0.2) -> torch.Tensor:
        """Random numbers of the tensor's shape and dtype, the same for the same change."""
        generator = torch.Generator().manual_seed(self.numbers.randrange(2**31))
        return (torch.randn(like.shape, generator=generator) * scale).to(like.dtype)

    def weight(self, *, bias: bool = False, norm: bool = False) -> torch.Tensor:
        """One of the model's weights: a matrix, a bias, or what a norm multiplies by."""
        wanted = [
            parameter
            for name, parameter in self.model.named_parameters()
            if "lora" not in name
            and (name.endswith("bias") if bias else parameter.dim() == (1 if norm else 2) and "bias" not in name)
        ]
        return self.numbers.choice(wanted or self.nothing("no such weight"))

    def linear(self) -> nn.Linear:
        """One of the model's own Linears."""
        found = [module for module in self.model.modules() if type(module) is nn.Linear]
        return self.numbers.choice(found or self.nothing("no Linear"))

    def part(self, ending: str) -> nn.Module:
        """A module whose class name ends so, in any case: `attention`, `mlp`, `norm`."""
        found = [module for module in self.model.modules() if type(module).__name__.lower().endswith(ending)]
        return self.numbers.choice(found or self.nothing(f"no {ending}"))

    def copied(self, module: nn.Module) -> Any:
        """A copy of a module under the model's own config."""
        config = self.model.config
        return copy.deepcopy(module, {id(config): config})

    def nothing(self, why: str) -> Any:
        """Pass over this change."""
        raise NotApplicable(why)
