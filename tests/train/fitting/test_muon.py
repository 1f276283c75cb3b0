"""The optimizer of matrices against torch's own, and a fit that uses it."""

import pytest
import torch

from tests.helpers.fits import after_step, assert_same_fit
from train.optimizer.muon import Muon, orthogonal

SHAPES = [(12, 40), (40, 12), (3, 40), (40,)]


def test_steps_are_those_of_torch() -> None:
    """Matrices move as under torch's Muon, lists of vectors and vectors as under its AdamW."""
    torch.manual_seed(0)
    ours = [torch.randn(shape).requires_grad_() for shape in SHAPES]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    found = Muon(ours, **settings)
    expected = [
        torch.optim.Muon(theirs[:2], adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(theirs[2:], **settings),
    ]
    for _ in range(4):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            two.grad = one.grad.clone()
        found.step()
        for each in expected:
            each.step()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    again = Muon(ours, **settings)
    again.load_state_dict(found.state_dict())
    kept = [entry[key] for entry in again.state_dict()["state"].values() for key in sorted(entry)]
    assert len(kept) == 2 + 2 + 3 + 3 and all(tensor.isfinite().all() for tensor in kept)


@pytest.mark.parametrize("shape", [(16, 16), (16, 60), (60, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7))
    assert values.min() > 0.4 and values.max() < 1.3


class Killed(BaseException):
    """Nobody catches it, so that nothing is saved on the way out."""


def die() -> None:
    raise Killed


def test_a_fit_with_it_goes_on_from_a_checkpoint(quick_fit, tmp_path, monkeypatch) -> None:
    settings = {"head": "attention", "optimizer": "muon", "head_rank": 16, "save_steps": 3, "max_steps": 6}
    whole = quick_fit(tmp_path / "whole", **settings)
    lines = whole[1]
    assert lines[-1]["fit/loss"] < lines[0]["fit/loss"]
    assert {"held_out/recall_4/layer_02", "held_out/recall/layer_04"} <= lines[-1].keys()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        after_step(patch, 5, die)
        quick_fit(tmp_path / "parts", **settings)
    assert_same_fit(whole, quick_fit(tmp_path / "parts", **settings, resume_from_checkpoint="latest"))
