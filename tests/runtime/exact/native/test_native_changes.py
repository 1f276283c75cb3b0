"""Whatever is done to a model whose layers run natively, its answers are stock's: ids, logits, cache.

The models of `test_metamorphic.py` are too small for our own kernels. `METAMORPHIC_SEQUENCES=2000 pytest -s` on this
file runs so many random sequences as well.
"""

import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from runtime.exact import order, probe, reference
from runtime.exact.native.library import native_library, why_not_native
from runtime.exact.native.tables import KEPT
from runtime.exact.packed import PackedLinears
from tests.helpers.metamorphic import answers
from tests.helpers.metamorphic.answers import compare_answers
from tests.helpers.metamorphic.changes import CHANGES, lives, numbers
from tests.helpers.metamorphic.sequences import Count, Sequence, run, shortened
from tests.helpers.metamorphic.subject import NATIVE, Subject, base, speculative
from tests.helpers.native.orders import torch_order

SEQUENCES = int(os.environ.get("METAMORPHIC_SEQUENCES", "4"))
# What a change is nothing without.
BEFORE: dict[str, tuple[str, ...]] = {
    "merge_adapter": ("add_lora",),
    "unmerge_adapter": ("add_lora", "merge_adapter"),
    "merge_and_unload": ("add_lora",),
    "unload": ("add_lora",),
    "set_another_adapter": ("add_lora", "add_lora"),
    "delete_an_adapter": ("add_lora", "add_lora"),
    "disable_adapters": ("add_lora",),
    "enable_adapters": ("add_lora", "disable_adapters"),
    "write_an_adapter": ("add_lora",),
    "scale_an_adapter": ("add_lora",),
    "remove_a_hook": ("hook_that_mixes_rows",),
    "unwrap": ("wrap_a_linear",),
    "remove_the_parametrizations": ("parametrize_a_weight",),
    "evaluate": ("train",),
    "sdpa_attention": ("eager_attention",),
    "default_generation_config": ("generation_config",),
    "untie": ("tie",),
}
# What leaves stock's answers as they were, by nature or in a family that has nothing of the kind.
LIVES = {change.__name__ for change in lives.CHANGES}
SILENT = LIVES | {
    "write_then_write_back", "flip_requires_grad", "unload", "disable_adapters", "hook_for_gradients", "remove_a_hook",
    "unwrap", "compile_a_part", "change_a_number", "lie_about_sizes", "to_the_cpu", "other_threads", "sdpa_attention",
    "train", "train_a_layer", "evaluate", "coarse_products", "coarse_products_of_onednn",
    "default_generation_config", "other_bounds", "without_onednn", "slow_attention_kernel",
}  # fmt: skip
LACKS = {
    "native qwen3": {"change_a_multiplier", "change_the_config"},
    "native granite": {"one_number_for_a_bias"},
}
OF_GRANITE = tuple(change.__name__ for change in numbers.CHANGES)
DRAWS = 3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@cache
def multiplies(family: str) -> bool:
    """Whether our kernel has torch's order in each Linear."""
    packed = PackedLinears.of(base(family, torch.bfloat16, 0))
    return packed is not None and all(joint.layout.order is not None for joint in packed.joint)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of it needs them; certificates are of the test's own, from probes that look at little."""
    native_library()  # built where all tests find it
    if why_not_native() is not None or torch_order() is None:
        pytest.skip(f"no native kernels here, or torch adds in an order of its own: {why_not_native()}")
    if not all(map(multiplies, NATIVE)):
        pytest.skip("torch multiplies in an order of its own here")
    for name, tokens in {"PROMPT_TOKENS": 4, "PROBE_TOKENS": 8, "FAR_TOKENS": 4}.items():
        monkeypatch.setattr(reference, name, tokens)
    for name, few in {"SUMMED": {13: 1}, "NORMED_PARTS": 1, "NORMED_NUMBERS": 2**14, "NORMED_ALONE": 9}.items():
        monkeypatch.setattr(order, name, few)
    monkeypatch.setattr(probe, "PROMPTS", (7,))
    monkeypatch.setattr(probe, "kind_sums", cache(order.kind_sums.__wrapped__))
    monkeypatch.setattr(answers, "NEW_TOKENS", 10)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))


def after(family: str, change: str, draw: int = 0) -> Sequence:
    """One change, after what it needs and an answer."""
    drawn = random.Random(f"{family} {change} {draw}")
    before = (*BEFORE[change], "answer") if change in BEFORE else ()
    steps = tuple((name, drawn.randrange(2**31)) for name in (*before, change))
    return Sequence(family, torch.bfloat16, drawn.randrange(20), steps)


def failures(sequences: Iterator[Sequence], count: Count) -> list[str]:
    """Of those run, what differs, shortened."""
    found = ((sequence, run(sequence, count)) for sequence in sequences)
    return [f"{shortened(sequence)}\n    {what}" for sequence, what in found if what is not None]


@pytest.mark.parametrize(("family", "changes"), [("native qwen3", tuple(CHANGES)), ("native granite", OF_GRANITE)])
def test_every_change(family: str, changes: tuple[str, ...]) -> None:
    """Layers run natively before each, and after many; but for those that are silent, stock answers otherwise then."""
    count = Count()

    def drawn() -> Iterator[Sequence]:
        for change in changes:
            for draw in range(DRAWS):  # a hook may be one that does nothing
                if change not in count.altered and not (draw and change in SILENT | LACKS[family]):
                    yield after(family, change, draw)

    assert not (differing := failures(drawn(), count)), "\n".join(differing)
    print(f"{family}: {count}, {count.native} natively after a change")
    assert count.begun == count.sequences >= len(changes) and count.native > len(changes) / 3
    assert set(changes) - count.altered <= SILENT | LACKS[family]


@pytest.mark.parametrize("family", NATIVE)
def test_sequences(family: str) -> None:
    """Random ones, as those of the small models."""
    count, seeds = Count(), range(-(-SEQUENCES // len(NATIVE)))
    differing = failures((Sequence.draw(family, torch.bfloat16, seed) for seed in seeds), count)
    print(f"{family}: {count}, {count.native} natively after a change, {len(differing)} differ")
    assert not differing, "\n".join(differing)
    assert count.begun == count.sequences


def kinds(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor of each kind: of a layer in the midst, and those that there is one of."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ("layers." not in name or "layers.1." in name) and "original" not in name:
            yield name, tensor


@pytest.mark.parametrize("family", NATIVE)
def test_every_kind_of_tensor_written_through_data(family: str) -> None:
    """One after the other, in the midst of their memory: neither place nor version tells; all answers are native."""
    subject = Subject(base(family, torch.bfloat16, 0))
    speculative(subject.model)
    compare_answers(subject)
    for answered, (name, tensor) in enumerate(kinds(subject.model), start=1):
        assert subject.native == answered and "layers native" in str(subject.model.specbound.certificate)
        before = subject.stock
        tensor.data *= torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape).to(tensor.dtype)
        compare_answers(subject)
        assert before.difference(subject.stock) is not None, name
    assert subject.native == subject.answers > 12


@pytest.mark.parametrize(
    ("check", "answer", "change"),
    [
        (
            "runtime.exact.native.tables.RotaryTables.forget",
            lambda tables: tables.__dict__.setdefault("_at", [None] * KEPT),
            "write_a_buffer_through_data",
        ),
        ("runtime.exact.prepared.structure", lambda model: ("as ever",), "change_an_epsilon"),
        ("runtime.exact.prepared.tensors", lambda model: ("as ever",), "replace_a_norm"),
        ("runtime.exact.packed.sums", lambda parts: torch.empty(0), "write_through_data"),
    ],
)
def test_negative_control_a_check_switched_off_is_caught(
    check: str, answer: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some draws of that one change, one gives another answer then, and does not with the check on."""
    with monkeypatch.context() as patch:
        patch.setattr(check, answer)
        draws = (after("native qwen3", change, draw) for draw in range(8))
        caught = next((each for each in draws if run(each, Count()) is not None), None)
    assert caught is not None and run(caught, Count()) is None
