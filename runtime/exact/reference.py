"""`Reference`: a text decoded one token at a time by the stock forward, with all that the probe compares.

Knows no policy and no block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from runtime.decoding.families import CACHE, has_windows, layers_with_keys
from runtime.exact.execution import linears

PROMPT_TOKENS = 24
PROBE_TOKENS = 32
TEXT_TEMPERATURE = 0.6
# Attention splits its work by the number of keys: rows far into a text are compared too.
FAR_CONTEXT = 2048
FAR_TOKENS = 16
FAR_WINDOW = 8192  # windows up to here are filled


@dataclass(frozen=True, slots=True)
class Reference:
    """One text decoded one token at a time by the stock forward.

    Attributes:
        first: cache rows before the tokens compared.
        token_ids: the tokens compared, shape [1, N], int64.
        logits: at each of them, [1, V].
        cache: keys and values of all positions, also of layers that read no more than a window of them.
        rows: each Linear's inputs at those positions, [1, in] each, and outputs.
    """

    first: int
    token_ids: Tensor
    logits: list[Tensor]
    cache: Any
    rows: Mapping[nn.Module, list[tuple[Tensor, Tensor]]]

    @property
    def length(self) -> int:
        """Tokens of the whole text."""
        return self.first + len(self.logits)

    @classmethod
    def near(cls, model: PreTrainedModel) -> "Reference":
        """A text of the base's own, from the token that begins one."""
        cache, running = DynamicCache(), DynamicCache(config=model.config)
        start = torch.tensor([[model.config.get_text_config().bos_token_id or 0]], device=model.device)
        prompt, _ = _write(model, cache, running, start, PROMPT_TOKENS)
        rows: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in linears(model)}

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows[module].append((args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])))

        hooks = [module.register_forward_hook(record) for module in rows]
        try:
            token_ids, logits = _write(model, cache, running, prompt[:, -1:], PROBE_TOKENS)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(PROMPT_TOKENS, token_ids[:, :-1], logits, cache, rows)

    @classmethod
    def far(cls, model: PreTrainedModel, near: "Reference") -> "Reference | None":
        """More of that text after its own cache rows many times over; None where the model takes no long text."""
        config = model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or FAR_CONTEXT + FAR_TOKENS
        window = min(config.sliding_window, FAR_WINDOW) if has_windows(config) else 0
        first = min(max(FAR_CONTEXT, window), longest - FAR_TOKENS)
        if first <= near.length:
            return None
        cache, running = DynamicCache(), DynamicCache(config=model.config)
        for index, layer in enumerate(near.cache.layers):
            repeats = [1, 1, -(-first // near.length), 1]
            keys, values = (rows.repeat(repeats)[:, :, :first].clone() for rows in (layer.keys, layer.values))
            cache.update(keys, values, index)
            running.update(keys, values, index)
        token_ids, logits = _write(model, cache, running, near.token_ids[:, -1:], FAR_TOKENS)
        return cls(first, token_ids[:, :-1], logits, cache, {})


def _write(
    model: PreTrainedModel, cache: DynamicCache, running: DynamicCache, newest: Tensor, count: int
) -> tuple[Tensor, list[Tensor]]:
    """Decode `count` tokens from `newest` [1, 1], one forward each: ids [1, count + 1] and logits, each [1, V].

    Args:
        cache: gets every row that is written, and drops none.
        running: as `generate` makes it, for the model to read.
    """
    generator = torch.Generator().manual_seed(0)
    token_ids, logits = newest, []
    layers: list[Any] = running.layers
    for _ in range(count):
        # Of its own accord a wrapper would count on from the last image that it saw.
        position = torch.tensor([[running.get_seq_length()]], device=newest.device)
        output = model(input_ids=token_ids[:, -1:], position_ids=position, use_cache=True, **{CACHE: running})
        for index, layer in enumerate(layers[: layers_with_keys(model.config)]):
            cache.update(layer.keys[:, :, -1:], layer.values[:, :, -1:], index)
        logits.append(output.logits[:, -1])
        # Drawn, and not too wildly: neither a loop of one phrase nor noise has the activations of text.
        probs = (logits[-1].float().cpu() / TEXT_TEMPERATURE).softmax(-1)
        drawn = torch.multinomial(probs, 1, generator=generator)
        token_ids = torch.cat([token_ids, drawn.to(newest.device)], dim=1)
    return token_ids, logits
