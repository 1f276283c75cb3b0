"""`LayerArguments`: what decoder layers take besides hidden states and what their rows see. Knows no drafting."""

from typing import Any

from torch import Tensor, nn

from runtime.decoding.cache import KVCache
from runtime.decoding.families import Family


class LayerArguments:
    """The arguments of each layer, for a block of tokens of one request.

    Shape suffixes: T tokens of the block, D hidden size, L layers, P size of a layer's own input.

    Args:
        body: the module that holds the layers.
        config: of the decoder of text.

    Attributes:
        has_inputs: each layer has an input of its own of each token.
    """

    def __init__(self, body: Any, config: Any, family: Family) -> None:
        self.body = body
        layers: list[Any] = list(getattr(body, family.layers))
        # older releases of transformers have tables of angles in each layer of some families
        self.rotary: nn.Module | None = getattr(body, family.rotary, None) if family.rotary else None
        self.cache_argument = family.cache_name(layers[0])
        self.unset: dict[str, Any] = dict.fromkeys(family.unset)
        self.kinds: list[Any] | None = config.layer_types if family.rotary_by_layer else None
        if family.thetas:
            self.kinds = config.layer_rope_theta
        self.axes = family.axes
        self.has_inputs = family.linked and bool(getattr(config, "hidden_size_per_layer_input", 0))
        self.lenders = {
            layer.self_attn.layer_type: index
            for index, layer in enumerate(layers)
            if family.linked and layer.self_attn.store_full_length_kv
        }

    def of(self, hidden: Tensor, start: int, stop: int, position_ids: Tensor, cache: KVCache) -> list[dict[str, Any]]:
        """Of layers `start` to `stop - 1`.

        Args:
            hidden: shape [1, T, D], for the dtype of rotary tables.
            position_ids: shape [1, T].
        """
        everywhere = {"position_ids": position_ids, self.cache_argument: cache, "use_cache": True, **self.unset}
        if self.lenders:
            everywhere["shared_kv_states"] = LentKeys(cache, self.lenders)
        kinds = [None] * (stop - start) if self.kinds is None else self.kinds[start:stop]
        tables = {kind: self._table(hidden, position_ids, kind) for kind in set(kinds)}
        return [everywhere | tables[kind] for kind in kinds]

    def _table(self, hidden: Tensor, position_ids: Tensor, kind: Any) -> dict[str, Any]:
        """Rotary angles of positions [1, T], as layers of a kind, or with a base of their own, take them."""
        if self.rotary is None:
            return {}
        if isinstance(self.rotary, nn.ModuleList):
            modules: list[Any] = list(self.rotary)
            tables = {each.config.rope_parameters["rope_theta"]: each for each in modules}
            return {"position_embeddings": tables[kind](hidden, position_ids=position_ids) if kind else None}
        which = {} if kind is None else {"layer_type": kind}
        positions = position_ids if self.axes == 1 else position_ids.expand(self.axes, *position_ids.shape)
        return {"position_embeddings": self.rotary(hidden, position_ids=positions, **which)}

    def add_inputs(self, given: list[dict[str, Any]], start: int, token_ids: Tensor, embedded: Tensor) -> None:
        """Add to the arguments of layers from `start` on what their own inputs are.

        Args:
            token_ids: shape [1, T].
            embedded: the same tokens at depth 0, shape [1, T, D].
        """
        inputs_TLP = self.body.project_per_layer_inputs(embedded, self.body.get_per_layer_inputs(token_ids, embedded))
        for index, arguments in enumerate(given, start):
            arguments["per_layer_input"] = inputs_TLP[:, :, index]


class LentKeys:
    """Keys and values of the layers that lend theirs to later ones, by kind of layer: they lie in the cache."""

    def __init__(self, cache: KVCache, lenders: dict[str, int]) -> None:
        self.cache, self.lenders = cache, lenders

    def __getitem__(self, kind: str) -> tuple[Tensor, Tensor]:
        return self.cache.rows(self.lenders[kind], 0)

    def __setitem__(self, kind: str, states: tuple[Tensor, Tensor]) -> None:
        """The lender has written them there already."""
