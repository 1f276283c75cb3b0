"""Changes of the numbers that a model computes with."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers.metamorphic.subject import Subject


@torch.no_grad()
def write_in_place(subject: Subject) -> None:
    """A matrix, under no_grad."""
    weight = subject.weight()
    weight.add_(subject.noise(weight))


def write_through_data(subject: Subject) -> None:
    """A matrix through `.data`: neither its pointer nor its version changes."""
    weight = subject.weight()
    weight.data += subject.noise(weight)


def write_one_number(subject: Subject) -> None:
    """One number of a matrix through `.data`."""
    weight = subject.weight().data
    weight[subject.numbers.randrange(len(weight)), subject.numbers.randrange(weight.shape[1])] += 4.0


def write_through_an_alias(subject: Subject) -> None:
    """A matrix through another library's view of its memory."""
    weight = subject.weight()
    torch.from_dlpack(weight.detach()).add_(subject.noise(weight))


@torch.no_grad()
def write_a_bias(subject: Subject) -> None:
    """A bias, under no_grad."""
    bias = subject.weight(bias=True)
    bias.add_(subject.noise(bias, 0.5))


def write_a_bias_through_data(subject: Subject) -> None:
    """A bias through `.data`."""
    bias = subject.weight(bias=True)
    bias.data += subject.noise(bias, 0.5)


@torch.no_grad()
def scale_a_norm(subject: Subject) -> None:
    """What a norm multiplies by, in place."""
    subject.weight(norm=True).mul_(1.5)


def scale_a_norm_through_data(subject: Subject) -> None:
    """What a norm multiplies by, through `.data`."""
    subject.weight(norm=True).data *= 0.6


def write_then_write_back(subject: Subject) -> None:
    """A matrix changed and restored: the version alone says that it was."""
    weight = subject.weight().data
    before = weight.clone()
    weight.zero_()
    weight.copy_(before)


def point_data_elsewhere(subject: Subject) -> None:
    """`.data` put into other memory."""
    weight = subject.weight()
    weight.data = weight.data * 1.25


def replace_a_parameter(subject: Subject) -> None:
    """Another Parameter in a Linear."""
    module = subject.linear()
    module.weight = nn.Parameter(module.weight.detach() + subject.noise(module.weight))


def replace_a_parameter_in_inference_mode(subject: Subject) -> None:
    """A Parameter that counts no versions."""
    module = subject.linear()
    with torch.inference_mode():
        module.weight = nn.Parameter(module.weight * 1.25, requires_grad=False)


def swap_two_weights(subject: Subject) -> None:
    """Two layers exchange the weights of one Linear or Conv1D."""
    first, second = subject.numbers.sample(list(subject.layers), 2)
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(first.modules(), second.modules(), strict=False)
        if type(mine) is type(theirs) and hasattr(mine, "weight") and mine.weight.shape == theirs.weight.shape
    ]
    mine, theirs = subject.numbers.choice(pairs or subject.nothing("no pair"))
    mine.weight, theirs.weight = theirs.weight, mine.weight


def load_a_state_dict(subject: Subject) -> None:
    """Every weight, a little off."""
    state = {name: value + subject.noise(value, 0.05) for name, value in subject.model.state_dict().items()}
    subject.model.load_state_dict(state)


def load_part_of_a_state_dict(subject: Subject) -> None:
    """Some of the weights, not strictly."""
    state = subject.model.state_dict()
    some = subject.numbers.sample(sorted(state), 3)
    subject.model.load_state_dict({name: state[name] * 1.125 for name in some}, strict=False)


def assign_a_state_dict(subject: Subject) -> None:
    """Every weight put in another's place."""
    state = {name: value + subject.noise(value, 0.05) for name, value in subject.model.state_dict().items()}
    subject.model.load_state_dict(state, assign=True)


def step_of_an_optimizer(subject: Subject) -> None:
    """One step of training."""
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    if not trained or any(parameter.is_inference() for parameter in subject.model.parameters()):
        subject.nothing("nothing to train")
    text = torch.arange(3, 19)[None]
    subject.model(text, labels=text).loss.backward()
    torch.optim.SGD(trained, lr=0.05).step()
    subject.model.zero_grad()


def tie(subject: Subject) -> None:
    """The unembedding becomes the embedding."""
    subject.model.get_output_embeddings().weight = subject.model.get_input_embeddings().weight


def untie(subject: Subject) -> None:
    """The unembedding gets weights of its own."""
    head = subject.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach() + subject.noise(head.weight))


def flip_requires_grad(subject: Subject) -> None:
    """Frozen, or trained again."""
    weight = subject.weight()
    subject.model.requires_grad_(not weight.requires_grad)


def write_a_buffer(subject: Subject) -> None:
    """Rotary frequencies, in place."""
    if not hasattr(subject.body, "rotary_emb"):
        subject.nothing("no rotary positions")
    subject.body.rotary_emb.inv_freq.mul_(0.75)


def write_a_buffer_through_data(subject: Subject) -> None:
    """Rotary frequencies through `.data`."""
    if not hasattr(subject.body, "rotary_emb"):
        subject.nothing("no rotary positions")
    subject.body.rotary_emb.inv_freq.data *= 0.75


def change_an_epsilon(subject: Subject) -> None:
    """What a norm adds before the root."""
    norm = subject.part("norm")
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    setattr(norm, name, 0.5)


def change_a_scaling(subject: Subject) -> None:
    """What attention scores are multiplied by."""
    module = subject.part("attention")
    if not hasattr(module, "scaling"):
        subject.nothing("no scaling")
    module.scaling *= 1.5


def resize_the_embeddings(subject: Subject) -> None:
    """More token ids."""
    if subject.lora is not None or any(map(parametrize.is_parametrized, subject.model.modules())):
        subject.nothing("its embeddings may be wrapped")
    subject.model.resize_token_embeddings(subject.model.config.vocab_size + 8, mean_resizing=False)


class Doubled(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Twice the weight."""
        return 2 * weight


def _with_weight(subject: Subject) -> nn.Linear:
    """A Linear whose weight is its own, and can be written."""
    linear = subject.linear()
    if "weight" not in linear._parameters or linear.weight.is_inference():
        subject.nothing("its weight is computed already, or cannot be")
    return linear


def parametrize_a_weight(subject: Subject) -> None:
    """A Linear whose weight is computed in every call."""
    parametrize.register_parametrization(_with_weight(subject), "weight", Doubled())


def norm_a_weight(subject: Subject) -> None:
    """torch's weight norm on a Linear."""
    parametrizations.weight_norm(_with_weight(subject))


def remove_the_parametrizations(subject: Subject) -> None:
    """All computed weights become plain ones."""
    found = [module for module in subject.model.modules() if parametrize.is_parametrized(module)]
    for module in found or subject.nothing("none there"):
        parametrize.remove_parametrizations(module, "weight")


def prune_a_weight(subject: Subject) -> None:
    """A Linear whose weight a hook computes."""
    prune.l1_unstructured(_with_weight(subject), "weight", amount=0.3)


def copy_a_layer_into_another(subject: Subject) -> None:
    """One layer's weights written over another's."""
    source, target = subject.numbers.sample(list(subject.layers), 2)
    if source.state_dict().keys() != target.state_dict().keys():
        subject.nothing("layers that differ")
    target.load_state_dict(copy.deepcopy(source.state_dict()))


CHANGES = (
    write_in_place, write_through_data, write_one_number, write_through_an_alias, write_a_bias,
    write_a_bias_through_data, scale_a_norm, scale_a_norm_through_data, write_then_write_back, point_data_elsewhere,
    replace_a_parameter, replace_a_parameter_in_inference_mode, swap_two_weights, load_a_state_dict,
    load_part_of_a_state_dict, assign_a_state_dict, step_of_an_optimizer, tie, untie, flip_requires_grad,
    write_a_buffer, write_a_buffer_through_data, change_an_epsilon, change_a_scaling, resize_the_embeddings,
    parametrize_a_weight, norm_a_weight, remove_the_parametrizations, prune_a_weight, copy_a_layer_into_another,
)  # fmt: skip
