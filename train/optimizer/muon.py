"""`Muon`: an optimizer that gives a matrix's update singular values near 1 (Jordan et al., 2024); AdamW for the rest.

A head sees few steps, and few directions dominate its gradients: with the same steps it learns more than by AdamW.
Updates are scaled to the size that AdamW's have (Liu et al., arXiv 2502.16982), so one learning rate serves for both.
(`torch.optim.Muon` takes matrices alone, and accelerate and DeepSpeed take one optimizer.) Knows no heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
# Of the quintic a x + b x^3 + c x^5, which five times over brings singular values in (0, 1] near 1.
QUINTIC, TIMES = (3.4445, -4.7750, 2.0315), 5
ADAMW_RMS = 0.2
# A matrix with a side up to this is a list of vectors, such as one for each age.
FEW = 8


class Muon(torch.optim.AdamW):
    """AdamW, with the updates of matrices made by Muon; arguments are AdamW's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; those of matrices are gone afterwards."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and _is_matrix(parameter):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(self._update(parameter), alpha=-group["lr"])
                    parameter.grad = None  # AdamW passes it by
        super().step()
        return loss

    def _update(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # what AdamW looks for in every state that it loads
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return orthogonal(gradient.lerp(momentum, MOMENTUM)) * (ADAMW_RMS * max(parameter.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix of the same shape with singular values near 1, by Newton's and Schulz's iteration."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.to(torch.bfloat16)
    found = found.T if tall else found
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(TIMES):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return (found.T if tall else found).to(matrix.dtype)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() == 2 and min(parameter.shape) > FEW
