"""`Muon`: an optimizer that gives a matrix's update singular values near 1 (Jordan et al., 2024); AdamW for the rest.

A head sees few steps, and few directions dominate its gradients: with the same steps it learns more than by AdamW.
Updates are scaled to the size that AdamW's have (Liu et al., arXiv 2502.16982), so one learning rate serves for both.
Knows no heads.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM, BETAS, EPS = 0.95, {"mean": 0.9, "square": 0.999}, 1e-8
# Of the quintic a x + b x^3 + c x^5, which five times over brings singular values in (0, 1] near 1.
QUINTIC, TIMES = (3.4445, -4.7750, 2.0315), 5
ADAMW_RMS = 0.2
# A matrix with a side up to this is a list of vectors, such as one for each age.
FEW = 8


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for all other parameters.

    Args:
        parameters: those to fit.
        lr, weight_decay: as of `torch.optim.AdamW`.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        listed = list(parameters)
        groups = [(True, [each for each in listed if _is_matrix(each)])]
        groups.append((False, [each for each in listed if not _is_matrix(each)]))
        named: list[dict[str, Any]] = [{"params": params, "is_matrix": kind} for kind, params in groups if params]
        super().__init__(named, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._orthogonal(parameter) if group["is_matrix"] else self._adam(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return loss

    def _orthogonal(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        ahead = parameter.grad.lerp(momentum, MOMENTUM)  # type: ignore[union-attr]
        return orthogonal(ahead) * (ADAMW_RMS * max(parameter.shape) ** 0.5)

    def _adam(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - BETAS["mean"])
        state["square"].lerp_(gradient.square(), 1 - BETAS["square"])  # type: ignore[union-attr]
        mean, square = (state[key] / (1 - beta ** int(state["step"])) for key, beta in BETAS.items())
        result: Tensor = mean / (square.sqrt() + EPS)
        return result


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
