"""What a fit says and does when something is wrong with batches, heads, base or disk; its picture."""

import fcntl
import os
from collections import namedtuple

import pytest
import torch
from matplotlib import image

import train.fit_exits
import train.fitting.learner
import train.fitting.loop
from runtime.errors import ConfigError, SpecBoundError
from tests.helpers.fits import losses, weights
from train.features.split import Split
from train.fitting.alarms import STEPS_WITHOUT_GRADIENT, Alarms, dead_heads
from train.fitting.curves import draw_curves

EXITS = (2, 4)


def poison(monkeypatch, steps, value=float("nan")) -> None:
    """Hidden states of layer 2 hold `value` in the batches of these steps."""
    features, calls = Split.features, iter(range(1, 1000))

    def poisoned(self, indices):
        found = features(self, indices)
        if next(calls) in steps:
            found.hidden[2][0, 0] = value
        return found

    monkeypatch.setattr(Split, "features", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_without_a_finite_loss_is_left_out_and_counted(quick_fit, tmp_path, monkeypatch, caplog, value):
    poison(monkeypatch, {2}, value)
    folder, lines = quick_fit(tmp_path / "out")
    assert [line["fit/skipped"] for line in lines] == [0, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    assert all(loss == loss for loss in losses(lines))
    (message,) = [text for text in caplog.messages if "left out" in text]
    assert message.startswith("step 2, sequences [")
    assert "not finite in hidden states of layer 2: left out" in message


def test_a_micro_batch_that_is_left_out_leaves_the_others_in(quick_fit, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    _, lines = quick_fit(tmp_path / "out", **settings)
    assert lines[0]["fit/skipped"] == 1
    assert min(lines[0][f"fit/gradient/layer_{layer:02d}"] for layer in EXITS) > 0


def test_too_many_batches_left_out_end_the_fit_with_the_last_by_name(quick_fit, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 3})
    expected = (
        r"2 batches were left out, more than max_skipped_batches 1; the last: step 3, sequences \[.*layer 2; look"
    )
    with pytest.raises(SpecBoundError, match=expected):
        quick_fit(tmp_path / "out", max_skipped_batches=1)
    assert not (tmp_path / "out" / "adapter").exists()


def test_more_than_half_left_out_end_the_fit_too(quick_fit, tmp_path, monkeypatch):
    """Ten may be left out, of four; before, the heads of the start were written."""
    poison(monkeypatch, {1, 2, 3, 4})
    with pytest.raises(SpecBoundError, match="3 batches were left out, more than half of all 4; the last: step 3"):
        quick_fit(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_count_goes_on_after_a_resume(quick_fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SpecBoundError):
        poison(patch, {1, 3})
        quick_fit(tmp_path / "out", max_skipped_batches=1, save_steps=1)
    with pytest.raises(SpecBoundError, match="2 batches were left out"):
        poison(monkeypatch, {1})
        quick_fit(tmp_path / "out", max_skipped_batches=1, save_steps=1, resume_from_checkpoint="latest")


def test_a_gradient_that_is_not_finite_takes_no_step(quick_fit, tmp_path, monkeypatch):
    calls, loss = iter(range(1000)), train.fitting.learner.distillation_loss

    def with_bad_gradient(logits, targets, *, kl_weight):
        found = loss(logits, targets, kl_weight=kl_weight)
        return found + (logits.sum() * 0).sqrt() if next(calls) == 2 else found  # 0, with the gradient of 1 / 0

    monkeypatch.setattr(train.fitting.learner, "distillation_loss", with_bad_gradient)
    folder, lines = quick_fit(tmp_path / "out")
    assert [line["fit/skipped"] for line in lines] == [0, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())


def test_a_head_without_a_gradient_is_named(quick_fit, tmp_path, monkeypatch, caplog):
    calls, loss = iter(range(1000)), train.fitting.learner.distillation_loss

    def only_the_second(logits, targets, *, kl_weight):
        return loss(logits.detach() if next(calls) % 2 == 0 else logits, targets, kl_weight=kl_weight)

    monkeypatch.setattr(train.fitting.learner, "distillation_loss", only_the_second)
    _, lines = quick_fit(tmp_path / "out", max_steps=STEPS_WITHOUT_GRADIENT)
    assert lines[-1]["fit/gradient/layer_02"] == 0 < lines[-1]["fit/gradient/layer_04"]
    found = [text for text in caplog.messages if "had no gradient" in text]
    assert len(found) == 1 and "exit layer 2 had no gradient in 10 steps" in found[0]


def test_a_head_no_better_than_chance_is_named(caplog):
    values = {"held_out/agreement/layer_02": 0.2, "held_out/agreement/layer_04": 0.3}
    assert Alarms().agreement(values, 0.2) == {"alarm/dead/layer_02": 1.0}
    assert caplog.messages == [
        "the head of exit layer 02 is right at 0.200 of the positions; always the same token would be at 0.200"
    ]


def test_a_head_that_was_never_better_than_chance_is_named_at_the_end(quick_fit, tmp_path, monkeypatch, caplog):
    """That of layer 2 is once above; of layer 4 never. Lines without figures are passed over."""
    chance = {"held_out/chance": 0.2}
    lines = [{"step": 1}, {"held_out/agreement/layer_02": 0.3, "held_out/agreement/layer_04": 0.2} | chance]
    lines += [{"held_out/agreement/layer_02": 0.1, "held_out/agreement/layer_04": 0.1} | chance]
    assert dead_heads(lines) == [4]
    evaluate = train.fitting.loop.evaluate
    monkeypatch.setattr(train.fitting.loop, "evaluate", lambda *rest, **more: evaluate(*rest, **more) | lines[1])
    quick_fit(tmp_path / "out")
    (found,) = [text for text in caplog.messages if "was never better" in text]
    assert found.startswith("the head of exit layer 4 was never better than always the same token: leave 4 out of ex")


def test_a_base_that_changed_is_noticed(quick_fit, tmp_path, monkeypatch):
    def spoil(config, accelerator, heads, splits, stop):
        next(iter(splits["fit"].extract.layers.model.parameters())).data[0, 0] += 1
        return heads

    monkeypatch.setattr(train.fit_exits, "fit", spoil)
    with pytest.raises(SpecBoundError, match="the base's weights changed while fitting"):
        quick_fit(tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "setting"),
    [
        ("corpus.answers.Answerer.answer", "generation_batch_size"),
        ("fitting.learner.Learner.learn", "per_device_train_batch_size"),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_memory_that_is_not_there_names_the_setting(quick_fit, tmp_path, monkeypatch, place, setting, error):
    def starve(*rest, **options):
        raise error

    monkeypatch.setattr(f"train.{place}", starve)
    with pytest.raises(ConfigError, match=rf"out of memory while .*: lower {setting} \(8 now\)"):
        quick_fit(tmp_path / "out", corpus_dir=None, generation_batch_size=8)


def test_the_disk_of_a_cache_is_stated_and_refused(quick_fit, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"write, 100.0 kB free: use --features onl"):
        patch.setattr("train.features.disk.shutil.disk_usage", lambda path: usage(100_000))
        quick_fit(tmp_path / "out", features="cache")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    folder, _ = quick_fit(tmp_path / "out", features="cache")
    stated = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cached features take"))
    size, unit = stated.removeprefix("cached features take ").split()[:2]
    kilobytes = float(size) * {"kB": 1, "MB": 1000}[unit]
    written = sum(path.stat().st_size for path in folder.rglob("features-*.safetensors")) / 1000
    assert kilobytes == pytest.approx(written, rel=0.03)


def test_two_fits_cannot_share_a_folder(quick_fit, tmp_path):
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="is in use by another fit"):
        quick_fit(tmp_path / "out")
    os.close(other)
    quick_fit(tmp_path / "out")


def test_a_fit_leaves_a_picture_and_figures_of_speed(quick_fit, tmp_path, monkeypatch):
    monkeypatch.setattr("train.fitting.loop.draw_curves", draw_curves)
    folder, _ = quick_fit(tmp_path / "out")
    picture = image.imread(folder / "curves.png")
    assert picture.shape[1] > 2 * picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05  # something is drawn
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"speed/tokens_per_second"' in last and '"speed/seconds_left": 0.0' in last
