"""Whatever is done to a model, its answers are stock's: random sequences of changes, then ids, logits and cache.

300 sequences with fixed seeds; `METAMORPHIC_SEQUENCES=5000 pytest -s tests/runtime/exact/test_metamorphic.py` runs
more of them and prints how many answers were compared.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from runtime.exact import reference
from runtime.exact.native.library import native_library
from tests.helpers.metamorphic.sequences import Count, Sequence, run, shortened
from tests.helpers.metamorphic.subject import FAMILIES
from tests.helpers.packing import pretend_to_pack

SEQUENCES = int(os.environ.get("METAMORPHIC_SEQUENCES", "300"))
CASES = [(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]
# Tokens of a probe, fewer still than in other tests: most sequences need one.
PROBE = {"PROMPT_TOKENS": 4, "PROBE_TOKENS": 8, "FAR_TOKENS": 4}
# Many changes are answered by plain decoding, and rightly so; but a suite in which nothing is drafted proves nothing.
SPECULATING_SHARE = 0.1

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linears are packed on any machine; certificates are of the test's own, from probes of a short text."""
    pretend_to_pack(monkeypatch)
    native_library()  # built where all tests find it
    for name, tokens in PROBE.items():
        monkeypatch.setattr(reference, name, tokens)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_every_answer_is_stocks(family: str, dtype: torch.dtype) -> None:
    """A failing sequence is shown with its seeds, shortened."""
    count = Count()
    failures = []
    for seed in range(-(-SEQUENCES // len(CASES))):
        sequence = Sequence.draw(family, dtype, seed)
        found = run(sequence, count)
        if found is not None:
            failures.append(f"{shortened(sequence)}\n    {found}")
    print(f"{family} {dtype}: {count}, {len(failures)} differ")
    assert not failures, "\n".join(failures)
    assert count.speculating > SPECULATING_SHARE * count.sequences


@pytest.mark.parametrize(
    ("family", "change", "seed"),
    [("llama", "give_a_layer_a_config_of_its_own", 0), ("gpt2", "change_a_head_size", 2)],
)
def test_what_was_wrong_once(family: str, change: str, seed: int) -> None:
    """Attention of a layer's own kind; heads of other numbers than the config's in the first layer."""
    assert run(Sequence(family, torch.float32, seed, ((change, 7 * seed),)), Count()) is None


@pytest.mark.parametrize(
    ("check", "answer", "change"),
    [
        ("runtime.exact.prepared.why_stock", lambda model: None, "wrap_the_model"),
        ("runtime.exact.prepared.structure", lambda model: ("as ever",), "hook_after"),
        ("runtime.exact.prepared.tensors", lambda model: ("as ever",), "replace_a_layer"),
        ("runtime.exact.packed.sums", lambda parts: torch.empty(0), "write_through_data"),
    ],
)
def test_negative_control_a_check_switched_off_is_caught(
    check: str, answer: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some sequences of that one change, one gives another answer then, and does not with the check on."""
    sequences = [Sequence("llama", torch.bfloat16, seed, ((change, 7 * seed),)) for seed in range(12)]
    with monkeypatch.context() as patch:
        patch.setattr(check, answer)
        caught = next((each for each in sequences if run(each, Count()) is not None), None)
    assert caught is not None and run(caught, Count()) is None
