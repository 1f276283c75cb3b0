"""Changes of the modules themselves: replaced, wrapped, of another class, compiled."""

import copy
import functools
from typing import Any

import torch
from torch import nn

from tests.helpers.metamorphic.changes.hooks import After
from tests.helpers.metamorphic.subject import Subject


class OwnLinear(nn.Linear):
    """A Linear of the user's own class."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Twice what it was."""
        return 2 * super().forward(hidden)


class SharesRows(nn.Module):
    """A module of the user's own, whose rows see one another."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows minus a part of their mean."""
        return hidden - 0.5 * hidden.mean(-2, keepdim=True)


def replace_the_unembedding(subject: Subject) -> None:
    """`set_output_embeddings`."""
    old = subject.model.get_output_embeddings()
    if type(old) is not nn.Linear:
        subject.nothing("wrapped")
    new = nn.Linear(old.in_features, old.out_features, bias=subject.numbers.random() < 0.5, dtype=old.weight.dtype)
    new.weight.data.copy_(old.weight + subject.noise(old.weight))
    if new.bias is not None:
        new.bias.data.copy_(subject.noise(new.bias, 0.5))
    subject.model.set_output_embeddings(new)


def replace_the_embedding(subject: Subject) -> None:
    """`set_input_embeddings`."""
    new = copy.deepcopy(subject.model.get_input_embeddings())
    new.weight.data += subject.noise(new.weight)
    subject.model.set_input_embeddings(new)


def replace_a_layer(subject: Subject) -> None:
    """A decoder layer by a copy with other weights."""
    index = subject.numbers.randrange(len(subject.layers))
    new = subject.copied(subject.layers[index])
    for parameter in new.parameters():
        parameter.data += subject.noise(parameter, 0.05)
    subject.layers[index] = new


def replace_a_norm(subject: Subject) -> None:
    """A layer's norm by a copy with other weights."""
    layer = subject.numbers.choice(list(subject.layers))
    name = (
        "ln_1" if hasattr(layer, "ln_1") else subject.numbers.choice(["input_layernorm", "post_attention_layernorm"])
    )
    new = copy.deepcopy(getattr(layer, name))
    new.weight.data *= 1.5
    setattr(layer, name, new)


def replace_the_last_norm(subject: Subject) -> None:
    """The norm below the unembedding, by a copy with other weights."""
    name = "ln_f" if hasattr(subject.body, "ln_f") else "norm"
    new = copy.deepcopy(getattr(subject.body, name))
    new.weight.data *= 1.5
    setattr(subject.body, name, new)


def _activation(subject: Subject, new: nn.Module) -> None:
    mlp = subject.part("mlp")
    setattr(mlp, "act" if hasattr(mlp, "act") else "act_fn", new)


def replace_an_activation(subject: Subject) -> None:
    """A layer's activation by another."""
    _activation(subject, nn.ReLU())


def replace_an_activation_by_one_that_shares_rows(subject: Subject) -> None:
    """A layer's activation by a module that is not row by row."""
    _activation(subject, SharesRows())


def replace_a_linear(subject: Subject) -> None:
    """A Linear of a layer by one of another class."""
    old = subject.linear()
    owners = [
        (module, name) for module in subject.model.modules() for name, child in module.named_children() if child is old
    ]
    new = OwnLinear(old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype)
    new.load_state_dict(old.state_dict(), strict=False)
    for owner, name in owners:
        setattr(owner, name, new)


def swap_two_layers(subject: Subject) -> None:
    """Two decoder layers change places, each with its own number in the cache."""
    first, second = subject.numbers.sample(range(len(subject.layers)), 2)
    layers = subject.layers
    layers[first], layers[second] = layers[second], layers[first]
    for index in (first, second):
        for module in layers[index].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def drop_the_last_layer(subject: Subject) -> None:
    """A layer less."""
    if len(subject.layers) < 3:
        subject.nothing("too few layers")
    del subject.layers[-1]
    subject.model.config.num_hidden_layers -= 1


class Wrapped:
    """A `forward` around a `forward`, which alters the first output."""

    def __init__(self, module: nn.Module, effect: str) -> None:
        self.inner = module.forward
        self.after = After(effect)
        functools.update_wrapper(self, self.inner, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        altered = self.after(None, args, output)  # type: ignore[arg-type]
        return output if altered is None else altered


def wrap(subject: Subject, module: nn.Module, *effects: str) -> None:
    """Put a wrapper around a module's `forward`."""
    module.forward = Wrapped(module, subject.numbers.choice(effects))  # type: ignore[assignment]


def wrap_the_model(subject: Subject) -> None:
    """`model.forward = wrapper`."""
    wrap(subject, subject.model, "nothing", "scale", "last")


def wrap_the_body(subject: Subject) -> None:
    """`model.model.forward = wrapper`."""
    wrap(subject, subject.body, "nothing", "scale", "mix")


def wrap_a_layer(subject: Subject) -> None:
    """A layer's `forward`."""
    wrap(subject, subject.numbers.choice(list(subject.layers)), "nothing", "scale", "mix")


def wrap_a_linear(subject: Subject) -> None:
    """A Linear's `forward`."""
    wrap(subject, subject.linear(), "nothing", "scale", "mix")


def unwrap(subject: Subject) -> None:
    """Take all wrappers off again."""
    found = [module for module in subject.model.modules() if isinstance(module.__dict__.get("forward"), Wrapped)]
    for module in found or subject.nothing("none there"):
        del module.forward


def _subclass(subject: Subject, module: nn.Module, *effects: str) -> None:
    after = After(subject.numbers.choice(effects))
    stock = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock.forward(self, *args, **kwargs)
        altered = after(self, args, output)
        return output if altered is None else altered

    functools.update_wrapper(forward, stock.forward)
    module.__class__ = type(f"Own{stock.__name__}", (stock,), {"forward": forward, "__module__": stock.__module__})


def subclass_the_model(subject: Subject) -> None:
    """`model.__class__` becomes a subclass of what it is."""
    _subclass(subject, subject.model, "nothing", "scale", "last")


def subclass_the_body(subject: Subject) -> None:
    """The same for the body."""
    _subclass(subject, subject.body, "scale", "mix")


def subclass_a_part(subject: Subject) -> None:
    """The same for a norm, an attention or an MLP."""
    _subclass(subject, subject.part(subject.numbers.choice(["norm", "attention", "mlp"])), "nothing", "scale", "mix")


def patch_a_class(subject: Subject) -> None:
    """The `forward` of a library's class, as other libraries' kernels are put in; put back when the sequence ends."""
    kind = type(subject.part(subject.numbers.choice(["norm", "mlp", "attention"])))
    owner = next(parent for parent in kind.__mro__ if "forward" in parent.__dict__)
    stock, after = owner.forward, After(subject.numbers.choice(["scale", "mix"]))  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return after(self, args, stock(self, *args, **kwargs))

    functools.update_wrapper(forward, stock)
    owner.forward = forward  # type: ignore[attr-defined]
    subject.restore.append(lambda: setattr(owner, "forward", stock))


def compile_a_part(subject: Subject) -> None:
    """A norm or an activation in torch.compile."""
    torch._dynamo.reset()
    subject.part(subject.numbers.choice(["norm", "mlp"])).compile(backend="eager", dynamic=True)


CHANGES = (
    replace_the_unembedding, replace_the_embedding, replace_a_layer, replace_a_norm, replace_the_last_norm,
    replace_an_activation, replace_an_activation_by_one_that_shares_rows, replace_a_linear, swap_two_layers,
    drop_the_last_layer, wrap_the_model, wrap_the_body, wrap_a_layer, wrap_a_linear, unwrap, subclass_the_model,
    subclass_the_body, subclass_a_part, patch_a_class, compile_a_part,
)  # fmt: skip
