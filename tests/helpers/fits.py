"""What tests of fits share: what a fit left behind, and that two of them are the same."""

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from train.fitting.learner import Learner


def forget() -> None:
    """Accelerate keeps its state in class attributes; the next fit of the process must not see it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def losses(lines) -> list[float]:
    return [line["fit/loss"] for line in lines]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "model.safetensors")


def assert_same_fit(first, second) -> None:
    """Bit for bit: every figure of every step, and the weights."""
    assert first[1] == second[1]
    assert weights(first[0]).keys() == weights(second[0]).keys()
    assert all(torch.equal(tensor, weights(second[0])[name]) for name, tensor in weights(first[0]).items())


def after_step(patch, number: int, act) -> dict[int, list[list[int]]]:
    """Call `act` once `number` steps are done, before their figures are written; the text of every step, as seen."""
    seen: dict[int, list[list[int]]] = {}
    learn = Learner.learn

    def learn_and_act(self, text, *, step, learning_rate):
        values = learn(self, text, step=step, learning_rate=learning_rate)
        seen[step] = text.batches
        if step + 1 == number:
            act()
        return values

    patch.setattr(Learner, "learn", learn_and_act)
    return seen
