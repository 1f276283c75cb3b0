"""Certificates: kept, read again, made anew where they are damaged, and what they say."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import runtime.exact.probe
from runtime import SpeculationBounds
from runtime.exact.certificate import Certificate
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.probe import Agreement, certify, probe
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for certificates."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path / "specbound"


def test_kept_and_read_again(make_model: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is probed; another thread count, dtype or width is another certificate."""
    model = make_model()
    first = certify(model, "sha256:base", max_width=3)
    assert len(list(kept.iterdir())) == 1

    def refuse(*args: Any, **kwargs: Any) -> Certificate:
        raise AssertionError("probed again")

    monkeypatch.setattr(runtime.exact.probe, "probe", refuse)
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


def test_where_nothing_passes_nothing_is_drafted(make_model: Any, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's own loop and the reason why, width 1, and no certificate kept."""
    monkeypatch.setattr(runtime.exact.probe, "compare", lambda *args, **kwargs: Agreement(50, 3, 0.25))
    model = make_model()
    specbound = SpecBound(model, FakeHeads("random", [2]), SpeculationBounds(0.0, 2, 4))
    bounds = specbound.prepare(model)
    assert bounds.max_draft_tokens == 0
    assert specbound.certificate is not None and not specbound.certificate.bitwise
    assert "no way to run blocks keeps every bit on this machine: NOT bit for bit" in str(specbound.why_stock(model))
    assert not kept.exists()


def test_certificate_reads_well(make_model: Any, kept: Path) -> None:
    """One line that says what was checked, found, and where."""
    text = str(probe(make_model(), max_width=3))
    assert text.startswith("bit for bit equal to one-token decoding: 0 of ")
    assert "attention" in text and "float32" in text and "torch" in text and "\n" not in text


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


FIRST_CALLS = """
import os, torch
from runtime.decoding.layers import settle_kernels
torch.set_num_threads(2)
differing = 0
for _ in range(150):
    child = os.fork()
    if child == 0:
        settle_kernels()
        angles = torch.arange(53 * 64).float() * 0.37
        same = all(torch.equal(function(angles), function(angles)) for function in (torch.cos, torch.sin))
        os._exit(0 if same else 1)
    differing += os.waitpid(child, 0)[1] != 0
print(differing)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_the_first_forward_of_a_process_has_the_bits_of_all_others() -> None:
    """Rotary tables are computed by two threads; without settling, some processes of 150 get them wrong at first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "0", done.stderr
