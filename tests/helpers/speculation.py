"""Calls of `generate` with speculation and without, one and several, for the tests that compare them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runtime import SpeculationBounds, detach
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.lookup import MAX_MATCH
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import NATIVE_SHAPE, randomise, tiny

PROMPT = torch.tensor([[5, 17, 33, 8, 5, 17, 60]])
NEW_TOKENS = 24


def with_speculation(model: Any, truth: list[int], call: Callable[[], Any]) -> tuple[Any, SpecBound]:
    """Run with heads that are right two times of three."""
    heads = FakeHeads("mixed", [2, 4], truth, vocabulary=model.config.vocab_size)
    specbound = SpecBound(model, heads, SpeculationBounds(0.2, 4, 4))
    attach(model, specbound)
    try:
        torch.manual_seed(11)
        return call(), specbound
    finally:
        detach(model)


def both(model: Any, **options: Any) -> tuple[Any, Any, SpecBound]:
    """Plain and speculative output of one call, speculation with heads that know the plain one."""
    torch.manual_seed(11)
    stock = model.generate(**options)
    ids = stock if isinstance(stock, torch.Tensor) else stock.sequences
    found, specbound = with_speculation(model, ids[0].tolist(), lambda: model.generate(**options))
    return stock, found, specbound


BOUNDS = SpeculationBounds(0.2, 2, 6, max_branches=2, max_depth=3)
PROMPTS = [[5 + number, *range(3 + number, 6 + 4 * number), 5 + number] for number in range(6)]
GREEDY = {"do_sample": False, "max_new_tokens": 24}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 24}


class Told:
    """Proposes the next token of the text that a request's prompt begins, twice of three times, and another one."""

    modules, watched, exit_layers = (), (), (1, 2)

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = {text[0]: text for text in texts}

    def on(self, layers: DecoderLayers) -> "Told":
        """Nothing to move."""
        return self

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> Any:
        """As the kind of position says; layer 1 is not sure of every third one."""
        tail, texts = state.lookup._tail, self.texts.values()
        text = next((text for text in texts if tail == text[: state.length][-MAX_MATCH:]), [])
        proposed = []
        for node in nodes:
            position = state.length + len(state.paths[node])
            right = text[position] if position < len(text) else 1
            token = (right + position % 2) % 90
            proposed.append([(token, 0.1 if layer == 1 and position % 3 == 0 else 0.9), ((token + 1) % 90, 0.3)])
        return proposed


def base(dtype: torch.dtype) -> Any:
    """A random model: in bfloat16 of sizes that our kernels take."""
    if dtype == torch.float32:
        return tiny("llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **NATIVE_SHAPE), dtype=dtype).eval()
    randomise(model)
    return model


def alone(model: Any, options: dict[str, Any], prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """What stock generates of each prompt, the seed that of its place."""
    found = []
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        found.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    return found


def adapted(model: Any, texts: list[list[int]], bounds: SpeculationBounds = BOUNDS) -> Any:
    """A copy that speculates on texts it knows, two drafts of three right."""
    made = copy.deepcopy(model)
    whole = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
    return attach(made, SpecBound(made, Told(whole), bounds))
