"""Fits of a tiny base in this process: what is learnt and what it leaves; the plan of steps."""

import importlib.util

import pytest
import torch

from runtime import load_specbound
from runtime.adapter.folder import load_adapter
from runtime.drafting.heads import HEAD_KINDS
from runtime.errors import AdapterError, ConfigError
from tests.helpers.fits import assert_same_fit, losses, weights
from train.fitting.schedule import Plan
from train.settings.fit_config import FitConfig


@pytest.mark.parametrize("head", HEAD_KINDS)
def test_each_head_learns_and_gives_an_adapter_that_loads(fit, tmp_path, tiny_base, head):
    large = {"head_rank": 32, "per_device_train_batch_size": 96, "learning_rate": 0.03}
    folder, lines = fit(tmp_path / "out", head=head, max_steps=20, **large)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["fit/loss"] < 0.9 * lines[0]["fit/loss"], losses(lines)
    assert {"held_out/agreement/layer_02", "held_out/acceptance/layer_04"} <= lines[-1].keys()
    assert lines[-1]["held_out/accepted_length"] >= 1.0 and lines[-1]["held_out/predicted_speedup"] > 0.5
    adapter = load_adapter(folder / "adapter")
    assert adapter.config.head == head
    assert {tensor.dtype for name, tensor in weights(folder).items() if name != "draft_to_target"} == {torch.float32}
    model = load_specbound(folder / "adapter", tiny_base)
    text = torch.tensor([[5, 6, 7]])
    with model.specbound.disabled():
        plain = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=False)
    drafted = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, drafted)


def test_two_fits_are_the_same_and_another_seed_is_not(quick_fit, tmp_path):
    first = quick_fit(tmp_path / "a")
    assert_same_fit(first, quick_fit(tmp_path / "b"))
    assert losses(quick_fit(tmp_path / "c", seed=1, corpus_dir=None)[1]) != losses(first[1])


def test_accumulated_batches_learn_what_one_large_batch_does(quick_fit, tmp_path):
    whole, lines = quick_fit(tmp_path / "whole", per_device_train_batch_size=12, max_steps=8)
    parts, accumulated = quick_fit(
        tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=8
    )
    assert losses(accumulated) == pytest.approx(losses(lines), rel=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-3, atol=1e-4)


def test_cached_features_learn_what_online_features_do(quick_fit, tmp_path):
    folder, cached = quick_fit(tmp_path / "cache", features="cache", max_steps=8)
    assert len(list((folder / "features").rglob("*.safetensors"))) == 3
    assert losses(cached) == pytest.approx(losses(quick_fit(tmp_path / "online", max_steps=8)[1]), rel=1e-4)


def test_a_fit_begins_with_the_heads_of_an_adapter(quick_fit, tmp_path, fitted):
    """Its first loss is below that of new heads; the vocabulary is the adapter's; other heads are refused."""
    own = load_adapter(fitted)
    text = {"max_steps": 1, "learning_rate": 1e-9}
    folder, begun = quick_fit(tmp_path / "begun", init_adapter=str(fitted), **text)
    assert losses(begun)[0] < 0.99 * losses(quick_fit(tmp_path / "new", **text)[1])[0]
    for name, tensor in own.heads.state_dict().items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=1e-4, atol=1e-6)
    for settings in ({"head": "linear"}, {"head_rank": 8}, {"exit_layers": [2]}, {"draft_vocab_size": 32}):
        (name,) = settings
        with pytest.raises(ConfigError, match=f"{name}: expected .* as init_adapter has"):
            quick_fit(tmp_path / name, init_adapter=str(fitted), **settings)
    with pytest.raises(AdapterError, match="does not exist"):
        quick_fit(tmp_path / "none", init_adapter="no/such/adapter/here")


@pytest.mark.parametrize(
    ("name", "kept"),
    [("tensorboard", "specbound/events.out.*"), ("wandb", "wandb/offline-run-*/*.wandb"), ("trackio", "specbound.db")],
)
def test_trackers_get_the_figures(quick_fit, tmp_path, monkeypatch, name, kept):
    if importlib.util.find_spec(name) is None:  # an import here would be too early: trackio reads its folder there
        pytest.skip(f"{name} is not installed")
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": "out", "TRACKIO_DIR": "out"}.items():
        monkeypatch.setenv(key, str(tmp_path / value) if value == "out" else value)
    folder, _ = quick_fit(tmp_path / "out", report_to=[name], logging_steps=1)
    (found,) = folder.glob(kept)
    assert b"fit/loss" in found.read_bytes()


def plan(make_recipe, *, number=10, rank=0, world_size=1, **settings) -> Plan:
    config = FitConfig(**make_recipe("unused", **settings))
    return Plan(config, list(range(1, number + 1)), rank=rank, world_size=world_size)


def test_a_plan_sees_every_sequence_once_an_epoch(make_recipe):
    found = plan(make_recipe, per_device_train_batch_size=2, max_steps=-1, num_train_epochs=2)
    assert (found.steps_per_epoch, found.total) == (5, 10)
    steps = [step.batches[0] for step in found.text(0)]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(10))
    assert steps[:5] != steps[5:]
    assert [step for step in range(1, 11) if found.is_evaluated(step)] == [5, 10]


def test_processes_and_micro_batches_part_the_same_sequences(make_recipe):
    whole = plan(make_recipe, per_device_train_batch_size=4, max_steps=7)
    shapes = [(1, 2), (2, 1)]  # processes, micro-batches
    for world_size, micro_steps in shapes:
        parts = [
            plan(
                make_recipe,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=micro_steps,
                max_steps=7,
                rank=rank,
                world_size=world_size,
            )
            for rank in range(world_size)
        ]
        for step, *pieces in zip(whole.text(0), *(part.text(0) for part in parts), strict=True):
            seen = [index for piece in pieces for batch in piece.batches for index in batch]
            assert sorted(seen) == sorted(step.batches[0])
            assert {piece.num_positions for piece in pieces} == {step.num_positions}
            assert step.num_positions == sum(index + 1 for index in seen)


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_a_plan_can_start_anywhere(make_recipe, start):
    found = plan(make_recipe, per_device_train_batch_size=4, max_steps=7)
    assert list(found.text(start)) == list(found.text(0))[start:]


def test_the_learning_rate_warms_up_and_falls_to_nothing(make_recipe):
    found = plan(make_recipe, max_steps=20, warmup_ratio=0.2, learning_rate=1.0)
    rates = [found.learning_rate(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert plan(make_recipe, max_steps=1, warmup_ratio=0.0, learning_rate=1.0).learning_rate(0) == 1.0


class Stopped(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize(("given", "says"), [({}, False), ({"max_length": 1040}, False), ({"max_length": 30}, True)])
def test_answers_that_a_fit_would_cut_are_told_before_they_are_made(
    quick_fit, tmp_path, monkeypatch, caplog, given, says
):
    def stop(*rest, **options):
        raise Stopped

    monkeypatch.setattr("train.distil.distil", stop)
    with pytest.raises(Stopped):
        quick_fit(tmp_path / "out", corpus_dir=None, **given)
    expected = "max_length 30 cuts answers that are generated whole: set it to max_prompt_tokens + max_new_tokens"
    assert [text.startswith(expected) for text in caplog.messages if "max_length" in text] == [True] * says
