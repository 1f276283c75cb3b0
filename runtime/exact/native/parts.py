"""`LayerParts`: a decoder layer of the Llama kind, taken apart for kernels that compute all of it.

Which kinds there are, and what their norms are called, says `families/table.py`.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from runtime.decoding.families import BEFORE, Family

# Names of Linears that read the same input: apart, or as one.
QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
ACTIVATIONS = ("silu", "gelu")


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer.

    Attributes:
        attention: the module, which holds head size, scaling and layer index.
        norms: before attention, after it, before the gated part, after it; None where there is none.
        linears: query, key and value; output; gate and up; down. Those of a tuple read the same input.
        activation: of the gate, number by number.
        head_norms: of queries and of keys, each head by itself (Qwen3) or all together (OLMo 2); or None.
        rotary: whether heads are turned to their positions; SmolLM3 leaves some layers out.
        multiplier: of what is added to the residual (Granite).
        window: keys that a token sees at most; None where it sees all.
    """

    attention: Any
    norms: tuple[Any, Any, Any, Any]
    linears: tuple[tuple[Any, ...], ...]
    activation: nn.Module
    head_norms: tuple[Any, Any] = (None, None)
    rotary: bool = True
    multiplier: float = 1.0
    window: int | None = None

    @property
    def all_norms(self) -> list[Any]:
        """Those that there are, those of heads last."""
        return [norm for norm in (*self.norms, *self.head_norms) if norm is not None]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of queries, of keys, and the size of each, as the weights have them."""
        size: int = self.attention.head_dim
        queries = self.linears[1][0].weight.shape[1] // size
        whole = sum(linear.weight.shape[0] for linear in self.linears[0]) // size
        return queries, (whole - queries) // 2, size

    @property
    def norms_all_heads(self) -> bool:
        """Whether the norms of queries and keys, where there are such, are of all heads together."""
        norm = self.head_norms[0]
        return norm is not None and len(norm.weight) != self.heads[2]

    @property
    def inner(self) -> int:
        """Size of the gated part."""
        size: int = self.linears[3][0].weight.shape[1]
        return size

    @property
    def hidden(self) -> int:
        """Size of the hidden state."""
        size: int = self.linears[0][0].weight.shape[1]
        return size

    @property
    def fits_together(self) -> bool:
        """Whether weights have the shapes that the sizes above ask for: a kernel reads so much of each."""
        (queries, keys, size), hidden, inner = self.heads, self.hidden, self.inner
        wanted = ((queries + 2 * keys) * size, hidden), (hidden, queries * size), (2 * inner, hidden), (hidden, inner)
        outputs = [sum(linear.weight.shape[0] for linear in group) for group in self.linears]
        inputs = [{linear.weight.shape[1] for linear in group} for group in self.linears]
        pairs = zip(outputs, inputs, wanted, strict=True)
        each = (queries * size, keys * size) if self.norms_all_heads else (size, size)
        heads = zip(self.head_norms, each, strict=True)
        return (
            all((rows, columns) == (one, {other}) for rows, columns, (one, other) in pairs)
            and keys > 0
            and queries % keys == 0
            and all(norm.weight.shape == (hidden,) for norm in self.norms if norm is not None)
            and all(norm.weight.shape == (numbers,) for norm, numbers in heads if norm is not None)
        )

    @classmethod
    def of(cls, layer: Any, family: Family) -> "LayerParts | None":
        """None where the layer is of another kind, or somebody listens in."""
        if family.norms is None or is_listened_to(layer):
            return None
        try:
            attention, mlp = layer.self_attn, layer.mlp
            linears = (
                _named(attention, QUERY_KEY_VALUE), (attention.o_proj,), _named(mlp, GATE_UP), (mlp.down_proj,)
            )  # fmt: skip
            before, after, second, last = (name and getattr(layer, name) for name in family.norms)
            activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
            # Of some families each layer knows its window, of others the config has one for all.
            knows = attention if family.by_layer else attention.config if family.windows else None
        except AttributeError:
            return None
        parts = cls(
            attention,
            (before, after, second, last),
            linears,
            activation,
            head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else (None, None),
            rotary=bool(getattr(attention, "use_rope", True)),
            multiplier=float(getattr(layer, "residual_multiplier", 1.0)),
            window=getattr(knows, "sliding_window", None),
        )
        plain = all(hasattr(norm, "weight") and epsilon(norm) is not None for norm in parts.all_norms)
        return parts if plain and any(name in type(activation).__name__.lower() for name in ACTIVATIONS) else None

    def is_llama(self, family: Family) -> bool:
        """Whether the layer has nothing that Llama's own layers lack, its window aside."""
        return (
            (family.norms, family.weighing, family.rounds_turns) == (BEFORE, "rounded", True)
            and self.head_norms == (None, None)
            and self.rotary
            and self.multiplier == 1.0
            and len(self.linears[0]) == 3
            and "silu" in type(self.activation).__name__.lower()
        )


def epsilon(norm: Any) -> Any:
    """What a norm adds to the mean of squares, under either of its names; None where it is of another kind."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def is_listened_to(module: nn.Module) -> bool:
    """Whether there is a hook or a `forward` of somebody's on a module or one within it."""
    return any(
        each._forward_hooks or each._forward_pre_hooks or "forward" in each.__dict__ for each in module.modules()
    )


def _named(module: Any, names: tuple[tuple[str, ...], ...]) -> tuple[Any, ...]:
    """Submodules by the first names that it has.

    Raises:
        AttributeError: it has none of them.
    """
    own = next((each for each in names if hasattr(module, each[0])), names[0])
    return tuple(getattr(module, name) for name in own)
