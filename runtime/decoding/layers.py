"""`DecoderLayers`: the base's own embedding, decoder layers, final norm and unembedding, one at a time.

Masks are not needed, because block attention gives each query row its own keys. Knows nothing of drafting, exits or
files, and of families only what `families/` says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.decoding.arguments import LayerArguments
from runtime.decoding.cache import Block, KVCache, position_ids
from runtime.decoding.families import CACHE_LENGTH, check_supported
from runtime.decoding.rows import TreeRows
from runtime.decoding.wrappers import blank_tokens
from runtime.drafting.prompt_states import PromptStates

# Of the model's body, while it runs under a policy of native layers: what runs several at once.
NATIVE = "specbound_native"


class DecoderLayers:
    """The base model as parts that run on a block of tokens of one request.

    Shape suffixes: T tokens of the block, D hidden size, V vocabulary.
    """

    def __init__(self, model: Any) -> None:
        settle_kernels()
        family = check_supported(model)
        body: Any = model.get_submodule(family.body)
        config = model.config.get_text_config()
        self.model: PreTrainedModel = model
        self.body: nn.Module = body
        self.config = config
        self.embedding: nn.Module = getattr(body, family.embedding)
        self.layers: list[nn.Module] = list(getattr(body, family.layers))
        self.norm: nn.Module = getattr(body, family.norm)
        self.unembedding: nn.Module = model.get_output_embeddings()
        self.arguments = LayerArguments(body, config, family)
        self.positions: nn.Module | None = getattr(body, family.positions) if family.positions else None
        rooted = family.root is not None and getattr(config, family.root)
        multiplier = config.hidden_size**0.5 if rooted else getattr(config, "embedding_multiplier", 1.0)
        self.embedding_multiplier = float(multiplier)
        self.normed, self.offset, self.scales_states = family.normed, family.offset, family.scales_states
        self.blank = torch.tensor(blank_tokens(model.config), dtype=torch.int64)
        self.padding = int(getattr(config, "pad_token_id", None) or 0)
        factor = None if family.factor is None or not family.scaled else getattr(config, family.factor)
        self.logits_factor: float | None = factor
        scaling = getattr(config, "logits_scaling", 1.0) if family.scaled else 1.0
        self.logits_scaling = 1 / factor if factor else float(scaling)
        self.logits_cap: float | None = getattr(config, "final_logit_softcapping", None) if family.scaled else None

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

    def embed(self, token_ids: Tensor, position: int, tree: TreeRows | None = None) -> Tensor:
        """Hidden states at depth 0.

        Args:
            token_ids: shape [1, T], int64, on the embedding's device.
            position: position of the first of them.
            tree: as `run` takes it.

        Returns:
            Shape [1, T, D], the base's dtype.
        """
        hidden: Tensor = self.embedding(self._padded(token_ids))
        if self.embedding_multiplier != 1.0:
            hidden = hidden * self.embedding_multiplier
        if self.positions is not None:
            ids = position_ids(position, token_ids.shape[1], hidden.device, tree)
            hidden = hidden + (self.positions(ids) if self.offset is None else self._learned(ids, position))
        return self.norm(hidden) if self.normed else hidden

    def _padded(self, token_ids: Tensor) -> Tensor:
        """Token ids with padding in the place of those that the model reads so."""
        if not self.blank.numel():
            return token_ids
        return token_ids.masked_fill(torch.isin(token_ids, self.blank.to(token_ids.device)), self.padding)

    def _learned(self, ids: Tensor, position: int) -> Tensor:
        """States of positions [1, T], the first of which is given too, from a module that counts them on."""
        assert self.positions is not None and self.offset is not None
        states: Tensor = self.positions(position_ids=ids, **{CACHE_LENGTH: position}, **dict.fromkeys(self.offset))
        return states

    def run(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        position: int,
        cache: KVCache,
        tree: TreeRows | None = None,
        tokens: Sequence[int] = (),
    ) -> Tensor:
        """Apply decoder layers `start` to `stop - 1` to a block of tokens, appending to the cache.

        Args:
            hidden: shape [1, T, D], the block at depth `start`.
            position: position of the block's first token.
            tree: what the rows see; None where each sees all that is before it, in the cache and in the block.
            tokens: their ids, for layers that have inputs of their own.

        Returns:
            Shape [1, T, D], the block at depth `stop`.
        """
        return self.run_all([Block(hidden, start, stop, position, cache, tree, tokens)])[0]

    def run_all(self, blocks: Sequence[Block]) -> list[Tensor]:
        """As `run`, for blocks of several requests, all from one depth to one other; each row keeps its bits.

        Where the layers run natively all blocks go through them together, elsewhere one after the other.
        """
        native = self.body.__dict__.get(NATIVE)
        if native is None:
            return [self._run(block) for block in blocks]
        outputs: list[Tensor] | None = native(blocks)
        if outputs is not None:
            return outputs
        return [self._run(blocks[0])] if len(blocks) == 1 else [self.run_all([block])[0] for block in blocks]

    def _run(self, block: Block) -> Tensor:
        """One block, layer by layer."""
        through = block.hidden, block.start, block.stop, block.position
        return block.cache.run(partial(self._through, block.tokens), *through, block.tree)

    def _through(
        self,
        tokens: Sequence[int],
        hidden: Tensor,
        start: int,
        stop: int,
        position_ids: Tensor,
        cache: KVCache,
        mask: Tensor | TreeRows | None,
    ) -> Tensor:
        """As `run`, with positions [1, T]; `BlockAttention` gets the mask, or what the rows see, from the layers."""
        given = self.arguments.of(hidden, start, stop, position_ids, cache)
        if self.arguments.has_inputs:
            ids = self._padded(torch.tensor([tokens], device=self.device))
            self.arguments.add_inputs(given, start, ids, self.embedding(ids))
        for layer, arguments in zip(self.layers[start:stop], given, strict=True):
            above = layer(hidden, attention_mask=mask, **arguments)
            hidden = above[0] if isinstance(above, tuple) else above
        return hidden

    def keep(self, cache: KVCache, settled: int, places: Sequence[int]) -> None:
        """As `KVCache.keep`, in one call where the layers run natively."""
        native = self.body.__dict__.get(NATIVE)
        if native is None:
            cache.keep(settled, places)
        else:
            native.keep(cache, settled, places)

    def logits(self, hidden: Tensor) -> Tensor:
        """Target logits, shape [1, T, V], of a block at the top: final norm, unembedding, the family's scaling."""
        return self.unembed(self.norm(hidden))

    def unembed(self, normed: Tensor) -> Tensor:
        """Target logits, shape [1, T, V], of normed top states, shape [1, T, D]."""
        if self.scales_states:
            scaled: Tensor = self.unembedding(normed / self.logits_scaling)
            return scaled
        logits: Tensor = self.unembedding(normed)
        if self.logits_factor is not None:
            logits = logits * self.logits_factor
        elif self.logits_scaling != 1.0:
            logits = logits / self.logits_scaling
        if self.logits_cap is None:
            return logits
        return torch.tanh(logits / self.logits_cap) * self.logits_cap

    def tops(self, hidden: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Normed top states [1, T, D] and target logits [1, T, V] of blocks at the top, one of each request."""
        native = self.body.__dict__.get(NATIVE)
        if len(hidden) == 1 or native is None or native.unembedding is None:
            normed = [self.norm(one) for one in hidden]
            return normed, [self.unembed(one) for one in normed]
        rows = [one.shape[1] for one in hidden]
        together = self.norm(torch.cat(list(hidden), 1))
        return list(torch.split(together, rows, 1)), list(torch.split(self.unembed(together), rows, 1))

    @contextmanager
    def watching(self, exit_layers: Sequence[int] = ()) -> Iterator[PromptStates]:
        """While open, a forward of the model leaves there what heads read of a prompt.

        Args:
            exit_layers: where hidden states are taken; without any only the last position's top state is.
        """
        seen = PromptStates()
        if self.scales_states:
            hooks = [self.norm.register_forward_hook(lambda module, args, output: seen.see_top(output[0, -1]))]
        else:
            hooks = [self.unembedding.register_forward_pre_hook(lambda module, args: seen.see_top(args[0][0, -1]))]
        for depth in exit_layers:
            hook = self.layers[depth - 1].register_forward_hook
            hooks.append(hook(lambda module, args, output, depth=depth: seen.see(depth, output)))
        if exit_layers:
            start = self.layers[0].register_forward_pre_hook
            hooks.append(start(lambda _, args, kwargs: seen.see(0, args or kwargs["hidden_states"]), with_kwargs=True))
            hooks.append(
                self.norm.register_forward_hook(lambda module, args, output: seen.see(self.num_layers, output))
            )
        try:
            yield seen
        finally:
            for each in hooks:
                each.remove()


def settle_kernels() -> None:
    """Let the CPU's vector maths choose its kernels, from one thread.

    In a process's first call two threads may get different ones, once: rotary tables, and all of the first forward,
    then have other bits than ever after (38 of 300 processes; torch 2.13 with MKL, 2 threads).
    """
    for function in (torch.cos, torch.sin):
        function(torch.ones(1))
