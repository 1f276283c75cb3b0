"""Changes of what modules read besides weights: rotary positions, and numbers and settings of their own."""

import copy
from typing import Any

from torch import nn

from tests.helpers.metamorphic.changes.hooks import After
from tests.helpers.metamorphic.changes.modules import wrap
from tests.helpers.metamorphic.subject import Subject


def _rotary(subject: Subject) -> nn.Module:
    module: nn.Module = getattr(subject.body, "rotary_emb", None) or subject.nothing("no rotary positions")
    return module


def replace_a_buffer(subject: Subject) -> None:
    """Rotary frequencies, by others."""
    rotary = _rotary(subject)
    rotary.inv_freq = rotary.inv_freq * 0.75


def change_a_rotary_scaling(subject: Subject) -> None:
    """What cosines and sines are multiplied by."""
    _rotary(subject).attention_scaling *= 1.5  # type: ignore[operator]


def replace_the_rotary_module(subject: Subject) -> None:
    """By a copy with other frequencies."""
    new = subject.copied(_rotary(subject))
    new.inv_freq.data *= 0.75
    subject.body.rotary_emb = new


def hook_on_the_rotary_module(subject: Subject) -> None:
    """Cosines louder."""
    subject.handles.append(_rotary(subject).register_forward_hook(After("scale")))


def wrap_the_rotary_module(subject: Subject) -> None:
    """Its `forward`."""
    wrap(subject, _rotary(subject), "nothing", "scale")


def change_a_head_size(subject: Subject) -> None:
    """Heads of half the size, for which there are no angles: stock raises, or decodes."""
    module = subject.part("attention")
    if not hasattr(module, "head_dim"):
        subject.nothing("it goes by another name")
    module.head_dim //= 2  # type: ignore[operator]


def change_a_multiplier(subject: Subject) -> None:
    """What a layer's parts are multiplied by before they are added, or the embedding (Granite)."""
    module = subject.numbers.choice([*subject.layers, subject.body])
    name = "residual_multiplier" if module in list(subject.layers) else "embedding_multiplier"
    if not hasattr(module, name):
        subject.nothing("no multiplier")
    setattr(module, name, getattr(module, name) * 1.5)


def change_the_config(subject: Subject) -> None:
    """What logits are divided by (Granite), in the config, where stock reads it."""
    if not hasattr(subject.model.config, "logits_scaling"):
        subject.nothing("not scaled")
    subject.model.config.logits_scaling *= 1.5


def give_a_layer_a_config_of_its_own(subject: Subject) -> None:
    """A copy, in which attention is eager."""
    module = subject.part("attention")
    own = copy.deepcopy(module.config)
    own._attn_implementation = "eager"  # type: ignore[union-attr]
    module.config = own


def swap_two_norms(subject: Subject) -> None:
    """Two layers exchange a norm."""
    first, second = subject.numbers.sample(list(subject.layers), 2)
    name = "ln_1" if hasattr(first, "ln_1") else "input_layernorm"
    mine, theirs = getattr(first, name), getattr(second, name)
    setattr(first, name, theirs)
    setattr(second, name, mine)


def change_a_number(subject: Subject) -> None:
    """Any attribute of any module that is a number; what stock does not read counts for nothing."""
    kinds: dict[tuple[type, str], nn.Module] = {}
    for module in subject.model.modules():
        for name, value in vars(module).items():
            if type(value) in (int, float) and not name.startswith("_"):
                kinds[type(module), name] = module
    (_, name), module = subject.numbers.choice(
        sorted(kinds.items(), key=lambda item: (item[0][0].__name__, item[0][1]))
    )
    value = getattr(module, name)
    setattr(module, name, value + 0.25 if isinstance(value, float) else 2 * value + 1)


def lie_about_sizes(subject: Subject) -> None:
    """Linears say that they are larger than they are; stock goes by the weights."""
    for module in subject.model.modules():
        if type(module) is nn.Linear:
            module.in_features, module.out_features = 2 * module.in_features, 2 * module.out_features


def _plain(subject: Subject, *linears: Any) -> None:
    if any(type(linear) is not nn.Linear or "weight" not in linear._parameters for linear in linears):
        subject.nothing("not plain Linears")


def cut_a_gated_part(subject: Subject) -> None:
    """Half of the numbers between gate and down go; the modules keep saying how many there were."""
    mlp: Any = subject.part("mlp")
    if not hasattr(mlp, "gate_proj"):
        subject.nothing("no gate")
    _plain(subject, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    half = len(mlp.gate_proj.weight) // 2
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight.detach()[:half].clone())
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[:half].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, :half].clone())


def one_number_for_a_norm(subject: Subject) -> None:
    """In the place of one for each."""
    norm: Any = subject.part("norm")
    if not hasattr(norm, "weight"):
        subject.nothing("no weight")
    norm.weight = nn.Parameter(norm.weight.detach()[:1].clone())


def one_number_for_a_bias(subject: Subject) -> None:
    """In the place of one for each output."""
    linear = subject.linear()
    _plain(subject, linear)
    if linear.bias is None:
        subject.nothing("no bias")
    linear.bias = nn.Parameter(linear.bias.detach()[:1].clone())


CHANGES = (
    replace_a_buffer, change_a_rotary_scaling, replace_the_rotary_module, hook_on_the_rotary_module,
    wrap_the_rotary_module, change_a_head_size, change_a_multiplier, change_the_config,
    give_a_layer_a_config_of_its_own, swap_two_norms, change_a_number, lie_about_sizes, cut_a_gated_part,
    one_number_for_a_norm, one_number_for_a_bias,
)  # fmt: skip
