"""How a block of new tokens is computed: with the bits of one-token decoding, or batched.

A block's rows equal one-by-one rows only where every operation gives a row the same bits whatever else is in the
call. Attention and Linear kernels choose their order of additions by shape, so they are run row by row, or always
at one number of rows, where that matters. Knows nothing of drafting.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from runtime.decoding.families import family_of, own_attentions, text_decoder
from runtime.decoding.layers import NATIVE
from runtime.decoding.row_attention import RowAttention
from runtime.decoding.rows import as_alone
from runtime.decoding.wrappers import text_modules
from runtime.exact.attention import BlockAttention, block_attention
from runtime.exact.fused import fused_layers
from runtime.exact.native.prompt import PromptLayers
from runtime.exact.native.stack import NativeLayers, norms
from runtime.exact.packed import PackedLinears

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """How many rows of a block each operation sees in one call.

    Attributes:
        attention: how a block attends, one of `attention.KINDS`.
        linear_rows: weight shape -> rows in one call of these Linears: 1 is row by row; with more, the block is
            padded with zeros to a multiple of it.
        other_rows: the same for Linears of any other shape; None gives them the whole block in one call.
        packed_rows: shape of packed Linears -> rows in one call; these run packed, where a packed copy is at hand.
        fused: layers of the Llama kind whose Linears all run packed run as one function.
        native: these layers run several at a time in our own kernel, where it takes all of them.
        prompts: and, but for attention, so do those of a prompt's own forward.
        static: layers run over a `StaticCache`, in calls of fixed shapes; `attention` is `batched` then.
        expert_rows: rows in one call of a mixture of experts, which sorts them by expert; None for the whole block.
    """

    attention: str
    linear_rows: Mapping[Shape, int] = field(default_factory=dict)
    other_rows: int | None = None
    packed_rows: Mapping[Shape, int | None] = field(default_factory=dict)
    fused: bool = False
    native: bool = False
    static: bool = False
    expert_rows: int | None = 1
    prompts: bool = False

    @classmethod
    def rowwise(cls) -> "ExecutionPolicy":
        """Everything that may depend on the number of rows runs row by row."""
        return cls("rowwise", other_rows=1)

    @classmethod
    def batched(cls) -> "ExecutionPolicy":
        """Every operation sees the whole block."""
        return cls("batched", expert_rows=None)

    def rows_of(self, module: nn.Module) -> int | None:
        """Rows in one call of this Linear; None for the whole block."""
        return self.linear_rows.get(tuple(module.weight.shape), self.other_rows)  # type: ignore[arg-type]


@contextmanager
def execution(
    model: PreTrainedModel,
    policy: ExecutionPolicy,
    packed: PackedLinears | None = None,
    native: NativeLayers | None = None,
) -> Iterator[None]:
    """While open, `model` computes blocks by `policy`; afterwards its modules are as they were.

    Args:
        native: its layers, where they were made for this policy before.
    """
    patched: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
    body = text_decoder(model)
    with block_attention(model, policy.attention) as attention:
        try:
            assert native is None or policy.native
            if native is None and policy.native:
                native = native_layers(model, policy, packed, attention)
            body.__dict__[NATIVE] = native
            for module, forward in _forwards(model, policy, packed, attention, native):
                patched.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = forward
            yield
        finally:
            body.__dict__.pop(NATIVE, None)
            for module, hooked in patched:
                if hooked is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = hooked


def _forwards(
    model: PreTrainedModel,
    policy: ExecutionPolicy,
    packed: PackedLinears | None,
    attention: BlockAttention,
    native: NativeLayers | None,
) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """The modules that compute otherwise than by themselves, and how."""
    taken: set[nn.Module] = set()
    for index, module in enumerate(own_attentions(model)):
        yield module, _row_attention(model, module, index, policy)
        taken.update(module.modules())
    joints = [] if packed is None else [joint for joint in packed.joint if joint.shape in policy.packed_rows]
    calls = {joint.modules: in_rows(joint, policy.packed_rows[joint.shape]) for joint in joints}
    if native is not None:
        yield native.final, partial(norms, native.final, weighing=native.weighing)
    elif policy.fused:
        for layer, fused in fused_layers(model, calls, attention):
            yield layer, fused
            taken.update(layer.modules())
    for joint in joints:
        if taken.isdisjoint(joint.modules):
            yield from zip(joint.modules, joint.forwards(calls[joint.modules]), strict=True)
            taken.update(joint.modules)
    for module in linears(model):
        rows = policy.rows_of(module)
        if rows is not None and module not in taken:
            yield module, in_rows(_own_forward(module), rows)
    if policy.expert_rows is not None:
        for module in mixtures(model):
            if module not in taken:
                yield module, in_rows(_own_forward(module), policy.expert_rows)


def _own_forward(module: nn.Module) -> Callable[..., Tensor]:
    """The module's; another library's hook, where there is one, runs in each call."""
    return module.__dict__.get("forward") or partial(type(module).forward, module)


def native_layers(
    model: PreTrainedModel, policy: ExecutionPolicy, packed: PackedLinears | None, attention: BlockAttention
) -> NativeLayers | None:
    """The model's layers as runs in our own kernel; None where it does not take all of them under this policy."""
    family = family_of(model.config)
    if packed is None or family.norms is None or attention.stock == "eager":
        return None
    joint = {
        joint.modules: joint
        for joint in packed.joint
        if joint.layout.order is not None and policy.packed_rows.get(joint.shape, 1) is None
    }
    unembedding: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return NativeLayers.of(text_decoder(model), family, unembedding, joint, attention)


def prompt_layers(
    model: PreTrainedModel, policy: ExecutionPolicy, packed: PackedLinears | None
) -> PromptLayers | None:
    """What runs the layers of a prompt's own forward natively; None where our kernel does not take all of them."""
    stock = model.config.get_text_config()._attn_implementation
    native = native_layers(model, policy, packed, BlockAttention(policy.attention, stock))
    return (
        None
        if native is None or family_of(model.config).axes > 1
        else PromptLayers(text_decoder(model).layers, native)
    )


def _row_attention(
    model: PreTrainedModel, module: nn.Module, layer: int, policy: ExecutionPolicy
) -> Callable[..., Any]:
    """Its forward where it attends on its own; a block at once under the policy that batches all."""
    family, stock = family_of(model.config), model.config.get_text_config()._attn_implementation
    return RowAttention(
        _own_forward(module),
        layer,
        cache_argument=family.cache_name(module),
        stock=stock or "eager",
        masked=family.masked,
        whole=policy.attention == "batched",
    )


def linears(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that multiply blocks by a weight matrix, in the model's order; of a wrapper those of its text."""
    own = {inner for module in own_attentions(model) for inner in module.modules()}
    routers = (child for mixture in mixtures(model) for child in mixture.children())
    own |= {child for child in routers if type(child).forward is not nn.Linear.forward}  # they choose besides
    kinds = (nn.Linear, Conv1D)
    return [module for _, module in text_modules(model) if isinstance(module, kinds) and module not in own]


def mixtures(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that send each row to some of many experts, and add up what these make of it.

    Where a decoder layer does so itself, its experts: they get the rows, and which of them is for whom.
    """
    layers = set(getattr(text_decoder(model), family_of(model.config).layers))
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for _, module in text_modules(model):
        if module not in inside and not module._modules.keys().isdisjoint(("experts", "router")):
            mixture: Any = module.experts if module in layers else module
            found.append(mixture)
            inside.update(mixture.modules())
    return found


def in_rows(forward: Callable[..., Tensor], rows: int | None) -> Callable[..., Tensor]:
    """`forward` on so many rows a call; itself where `rows` is None."""
    return forward if rows is None else partial(call_in_rows, forward, rows)


def _rows_of(beside: Any, first: int, rows: int) -> Any:
    """Of what a mixture's experts get besides, [T, ...], the part of some rows."""
    return beside[first : first + rows] if isinstance(beside, Tensor) else beside


def call_in_rows(forward: Callable[..., Any], rows: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`forward` on a block [..., T, D], `rows` rows a call, the last call padded with zeros; [..., T, out].

    One row alone is passed on as it is: that is one-token decoding's own call.
    """
    if hidden.shape[-2] == 1:
        return forward(hidden, *args, **kwargs)
    outputs, rest = [], None
    for index, part in enumerate(torch.split(hidden, rows, dim=-2)):
        beside = [_rows_of(each, index * rows, rows) for each in args]
        given = part.shape[-2]
        full = part if given == rows else nn.functional.pad(part, (0, 0, 0, rows - given))
        output: Any = forward(as_alone(full), *beside, **kwargs)
        if isinstance(output, tuple):  # a mixture's, and how it routed its last rows: no layer reads that
            output, *rest = output
        outputs.append(output[..., :given, :])
    together = torch.cat(outputs, dim=-2)
    return together if rest is None else (together, *rest)
