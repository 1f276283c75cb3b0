"""Hooks of every kind on every kind of module."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from tests.helpers.metamorphic.subject import VOCABULARY, Subject

EFFECTS = ("nothing", "scale", "mix", "last", "count", "gate")
PLACES = ("model", "body", "layer", "attention", "mlp", "norm", "linear", "embedding", "head")


def altered(value: Any, effect: str) -> Any:
    """What a hook makes of token ids or hidden states; `mix`, `last`, `count` and `gate` see the call's other rows."""
    if not isinstance(value, torch.Tensor) or effect == "nothing" or value.dim() < 2:
        return value
    if not value.is_floating_point():
        return (value + 1) % VOCABULARY if effect == "scale" else value
    if effect == "scale":
        return value * 1.25
    if effect == "mix":
        return value + value.mean(-2, keepdim=True)
    if effect == "last":
        return torch.cat([value[..., :-1, :], value[..., -1:, :] * 1.5], dim=-2)
    if effect == "count":
        return value * (1 + value.shape[-2] / 8)
    return value * 1.5 if value.float().abs().max() > 2.5 else value


@dataclass(frozen=True)
class Before:
    """A hook that is called before its module."""

    effect: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """The first argument altered, by position or by name."""
        args = tuple(altered(value, self.effect) if index == 0 else value for index, value in enumerate(args))
        if kwargs is None:
            return args
        named = {"input_ids", "inputs_embeds", "hidden_states"}
        return args, {key: altered(value, self.effect) if key in named else value for key, value in kwargs.items()}


@dataclass(frozen=True)
class After:
    """A hook that is called after its module."""

    effect: str

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """The first output altered."""
        output = given[-1]
        if self.effect == "nothing":
            return None
        if isinstance(output, ModelOutput):
            key = next(iter(output))
            return type(output)(**dict(output) | {key: altered(output[key], self.effect)})
        if isinstance(output, tuple):
            return (altered(output[0], self.effect), *output[1:])
        return altered(output, self.effect)


def place(subject: Subject) -> nn.Module:
    """A module of a kind drawn first."""
    kind = subject.numbers.choice(PLACES)
    fixed = {
        "model": lambda: subject.model,
        "body": lambda: subject.body,
        "layer": lambda: subject.numbers.choice(list(subject.layers)),
        "linear": subject.linear,
        "embedding": subject.model.get_input_embeddings,
        "head": subject.model.get_output_embeddings,
    }
    module: nn.Module = fixed[kind]() if kind in fixed else subject.part(kind)
    return module


def _effect(subject: Subject) -> str:
    return subject.numbers.choice(EFFECTS)


def hook_before(subject: Subject) -> None:
    """A forward pre-hook."""
    subject.handles.append(place(subject).register_forward_pre_hook(Before(_effect(subject))))


def hook_before_with_kwargs(subject: Subject) -> None:
    """A forward pre-hook that sees keywords."""
    hook = Before(_effect(subject))
    subject.handles.append(place(subject).register_forward_pre_hook(hook, with_kwargs=True))


def hook_after(subject: Subject) -> None:
    """A forward hook."""
    subject.handles.append(place(subject).register_forward_hook(After(_effect(subject))))


def hook_after_with_kwargs(subject: Subject) -> None:
    """A forward hook that sees keywords."""
    hook = After(_effect(subject))
    subject.handles.append(place(subject).register_forward_hook(hook, with_kwargs=True, prepend=True))


def hook_always_called(subject: Subject) -> None:
    """A forward hook that is called after an exception too."""
    subject.handles.append(place(subject).register_forward_hook(After(_effect(subject)), always_call=True))


def hook_that_mixes_rows(subject: Subject) -> None:
    """A forward hook whose output depends on the call's other rows."""
    effect = subject.numbers.choice(["mix", "last", "count", "gate"])
    subject.handles.append(place(subject).register_forward_hook(After(effect)))


def hook_for_gradients(subject: Subject) -> None:
    """A backward hook, which stays silent in generation."""
    subject.handles.append(place(subject).register_full_backward_hook(lambda module, given, output: None))


def hook_on_every_module(subject: Subject) -> None:
    """One of torch's own hooks for all modules of the process, gone when the sequence ends."""
    kind = type(subject.part(subject.numbers.choice(["norm", "mlp", "attention"])))
    hook = After(_effect(subject))

    def called(module: nn.Module, args: Any, output: Any) -> Any:
        return hook(module, args, output) if type(module) is kind else None

    handle = nn.modules.module.register_module_forward_hook(called)
    subject.handles.append(handle)
    subject.restore.append(handle.remove)


def remove_a_hook(subject: Subject) -> None:
    """One of the hooks above."""
    if not subject.handles:
        subject.nothing("no hook")
    subject.handles.pop(subject.numbers.randrange(len(subject.handles))).remove()


CHANGES = (
    hook_before, hook_before_with_kwargs, hook_after, hook_after_with_kwargs, hook_always_called,
    hook_that_mixes_rows, hook_for_gradients, hook_on_every_module, remove_a_hook, remove_a_hook,
)  # fmt: skip
