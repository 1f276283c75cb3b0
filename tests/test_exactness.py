"""The probe finds what must run row by row, keeps what it found, and says so; a policy that fails is not certified."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tests_heads import FakeHeads
from torch import nn

import runtime.exactness
from runtime import SpeculationBounds
from runtime.certificate import Certificate
from runtime.exactness import Reference, certify, compare, differing_shapes, probe
from runtime.execution import ExecutionPolicy, execution, linears
from runtime.generate import SpecBound


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for certificates."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path / "specbound"


class Shaky(nn.Linear):
    """A Linear whose rows change in the last bits with the number of rows, as some kernels do."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Off by a factor that only one-row calls do not have."""
        return super().forward(hidden) * (1.0 if hidden.shape[-2] == 1 else 1.0 + 2**-20)


def make_shaky(model: Any) -> Any:
    """The same model, its down projections sensitive to the number of rows."""
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Shaky
    return model


def test_a_linear_that_depends_on_rows_is_found(make_model: Any, kept: Path) -> None:
    """And the whole model passes with it row by row, and fails without (negative control)."""
    model = make_shaky(make_model())
    reference = Reference.decode(model)
    shape = tuple(model.model.layers[0].mlp.down_proj.weight.shape)
    assert shape in differing_shapes(model, reference, range(2, 5))
    certificate = probe(model, max_width=4)
    assert certificate.bitwise and certificate.rows_differing == 0 and certificate.rows_checked > 50
    assert certificate.rowwise_linears is None or shape in certificate.rowwise_linears
    everything = {tuple(module.weight.shape) for module in linears(model)}
    without = ExecutionPolicy(True, frozenset(everything - {shape}))
    assert compare(model, reference, without, [3])[1] > 0
    assert compare(model, reference, ExecutionPolicy.rowwise(), [3])[1] == 0


def test_kept_and_read_again(make_model: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is probed; another thread count, dtype or width is another certificate."""
    model = make_model()
    first = certify(model, "sha256:base", max_width=3)
    assert len(list(kept.iterdir())) == 1

    def refuse(*args: Any, **kwargs: Any) -> Certificate:
        raise AssertionError("probed again")

    monkeypatch.setattr(runtime.exactness, "probe", refuse)
    again = certify(model, "sha256:base", max_width=3)
    assert (again.policy, again.rows_checked, again.seconds) == (first.policy, first.rows_checked, 0.0)
    with pytest.raises(AssertionError, match="probed again"):
        certify(model, "sha256:other", max_width=3)
    with pytest.raises(AssertionError, match="probed again"):
        certify(model, "sha256:base", max_width=4)
    with pytest.raises(AssertionError, match="probed again"):
        certify(model.to(torch.bfloat16), "sha256:base", max_width=3)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bitwise": true}', "null"])
def test_a_damaged_certificate_is_made_anew(make_model: Any, kept: Path, text: str) -> None:
    """Whatever is in the file."""
    model = make_model()
    first = certify(model, "sha256:base", max_width=2)
    (path,) = kept.iterdir()
    path.write_text(text)
    assert certify(model, "sha256:base", max_width=2).policy == first.policy


def test_where_nothing_passes_nothing_is_drafted(
    make_model: Any, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, width 1, and no certificate kept."""
    monkeypatch.setattr(runtime.exactness, "compare", lambda *args, **kwargs: (50, 3))
    model = make_model()
    specbound = SpecBound(model, FakeHeads("random", [2]), SpeculationBounds(0.0, 2, 4))
    _, bounds = specbound.prepare(model)
    assert bounds.max_draft_tokens == 0
    assert specbound.certificate is not None and not specbound.certificate.bitwise
    assert "nothing is drafted on this machine. NOT bit for bit" in caplog.text
    assert not kept.exists()


def test_certificate_reads_well(make_model: Any, kept: Path) -> None:
    """One line that says what was checked, found, and where."""
    text = str(probe(make_model(), max_width=3))
    assert text.startswith("bit for bit equal to one-token decoding: 0 of ")
    assert "float32" in text and "torch" in text and "\n" not in text


def test_modules_are_as_they_were_after_an_error(make_model: Any) -> None:
    """Also those that another library has hooked."""
    model = make_model()
    hooked = model.lm_head
    forward = hooked.forward

    def hook(hidden: torch.Tensor) -> torch.Tensor:
        """What accelerate, for one, puts in the place of `forward`."""
        return forward(hidden)

    hooked.forward = hook
    with pytest.raises(RuntimeError, match="midway"), execution(model, ExecutionPolicy.rowwise()):
        assert "forward" in model.model.layers[0].mlp.down_proj.__dict__
        raise RuntimeError("midway")
    assert hooked.__dict__["forward"] is hook
    assert "forward" not in model.model.layers[0].mlp.down_proj.__dict__
    assert model.config._attn_implementation == "sdpa"
