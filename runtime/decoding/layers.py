"""`DecoderLayers`: the base's own embedding, decoder layers, final norm and unembedding, one at a time.

Masks are not needed, because block attention gives each query row its own keys. Knows nothing of drafting, exits or
files, and of families only what `families.py` says.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.decoding.cache import KVCache, position_ids
from runtime.decoding.families import check_supported

# Of the model's body, while it runs under a policy of native layers: what runs several at once.
NATIVE = "specbound_native"


class DecoderLayers:
    """The base model as parts that run on a block of tokens of one request.

    Shape suffixes: T tokens of the block, D hidden size, V vocabulary.
    """

    def __init__(self, model: Any) -> None:
        settle_kernels()
        family = check_supported(model)
        body = getattr(model, family.body)
        self.model: PreTrainedModel = model
        self.body: nn.Module = body
        self.config = model.config
        self.embedding: nn.Module = getattr(body, family.embedding)
        self.layers: list[nn.Module] = list(getattr(body, family.layers))
        self.norm: nn.Module = getattr(body, family.norm)
        self.unembedding: nn.Module = model.get_output_embeddings()
        self.rotary: nn.Module | None = getattr(body, family.rotary) if family.rotary else None
        self.positions: nn.Module | None = getattr(body, family.positions) if family.positions else None
        self.cache_argument = family.cache_argument
        self.embedding_multiplier = float(getattr(model.config, "embedding_multiplier", 1.0))
        self.logits_scaling = float(getattr(model.config, "logits_scaling", 1.0))

    @property
    def num_layers(self) -> int:
        """L, decoder layers of the base."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go in."""
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight.dtype

    def embed(self, token_ids: Tensor, position: int) -> Tensor:
        """Hidden states at depth 0.

        Args:
            token_ids: shape [1, T], int64, on the embedding's device.
            position: position of the first of them.

        Returns:
            Shape [1, T, D], the base's dtype.
        """
        hidden: Tensor = self.embedding(token_ids)
        if self.embedding_multiplier != 1.0:
            hidden = hidden * self.embedding_multiplier
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids(position, token_ids.shape[1], hidden.device))
        return hidden

    def run(self, hidden: Tensor, start: int, stop: int, position: int, cache: KVCache) -> Tensor:
        """Apply decoder layers `start` to `stop - 1` to a block of consecutive tokens, appending to the cache.

        Args:
            hidden: shape [1, T, D], the block at depth `start`.
            position: position of the block's first token; each of these layers holds exactly the rows below it.

        Returns:
            Shape [1, T, D], the block at depth `stop`.
        """
        return cache.run(self._through, hidden, start, stop, position)

    def _through(
        self, hidden: Tensor, start: int, stop: int, position_ids: Tensor, cache: KVCache, mask: Tensor | None
    ) -> Tensor:
        """As `run`; positions [1, T] and, where rows do not see just what is before them, the mask are tensors."""
        native = self.body.__dict__.get(NATIVE)
        if native is not None and mask is None:
            output: Tensor | None = native(hidden, start, stop, position_ids, cache)
            if output is not None:
                return output
        arguments: dict[str, Any] = {
            "position_ids": position_ids,
            self.cache_argument: cache,
            "use_cache": True,
        }
        if self.rotary is not None:
            arguments["position_embeddings"] = self.rotary(hidden, position_ids=position_ids)
        for layer in self.layers[start:stop]:
            above = layer(hidden, attention_mask=mask, **arguments)
            hidden = above[0] if isinstance(above, tuple) else above
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Target logits, shape [1, T, V], of a block at the top: final norm, unembedding, the family's scaling."""
        return self.unembed(self.norm(hidden))

    def unembed(self, normed: Tensor) -> Tensor:
        """Target logits, shape [1, T, V], of normed top states, shape [1, T, D]."""
        logits: Tensor = self.unembedding(normed)
        return logits / self.logits_scaling if self.logits_scaling != 1.0 else logits

    @contextmanager
    def watching_top(self) -> Iterator[list[Tensor]]:
        """While open, forwards of the model leave their last position's normed top state here, shape [D]."""
        seen: list[Tensor] = []
        hook = self.unembedding.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1]))
        try:
            yield seen
        finally:
            hook.remove()


def settle_kernels() -> None:
    """Let the CPU's vector maths choose its kernels, from one thread.

    It chooses in the first call of a process, and where two threads make that call together one of them may get
    another kernel, for that call only: rotary tables, and with them all of the first forward, then have other bits
    than ever after (38 of 300 processes; torch 2.13 with MKL, 2 threads).
    """
    for function in (torch.cos, torch.sin):
        function(torch.ones(1))
