"""Fits of a tiny base in this process: what is learnt, saved, continued and refused; the plan of steps."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train.loop
from runtime import load_specbound
from runtime.adapter import load_adapter
from runtime.errors import ConfigError
from runtime.heads import HEAD_KINDS
from train.checkpoints import MetricsLog, find_checkpoints
from train.fit_exits import main
from train.options import FitConfig
from train.plan import Plan

RESUMED = {"max_steps": 20, "save_steps": 4, "save_total_limit": 9}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in class attributes; a fit in the same process must not see another's."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fit(make_recipe):
    """`fit(folder, **settings)`: run it; returns the folder and the lines of the metrics log."""

    def run(folder, **settings):
        main(FitConfig(**make_recipe(folder, **settings)))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return folder, [json.loads(line) for line in lines]

    return run


def losses(lines) -> list[float]:
    return [line["fit/loss"] for line in lines]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "model.safetensors")


def assert_same_fit(first, second) -> None:
    """Bit for bit: every figure of every step, and the weights."""
    assert first[1] == second[1]
    assert weights(first[0]).keys() == weights(second[0]).keys()
    assert all(torch.equal(tensor, weights(second[0])[name]) for name, tensor in weights(first[0]).items())


def stop_after(step: int, monkeypatch) -> None:
    """Stop the fit once the checkpoint of this step is written."""
    save = train.loop.save_checkpoint

    def save_and_stop(accelerator, output_dir, now, *rest, **options):
        save(accelerator, output_dir, now, *rest, **options)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.loop, "save_checkpoint", save_and_stop)


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


def test_two_fits_are_the_same_and_another_seed_is_not(fit, tmp_path):
    first = fit(tmp_path / "a")
    assert_same_fit(first, fit(tmp_path / "b"))
    assert losses(fit(tmp_path / "c", seed=1, corpus_dir=None)[1]) != losses(first[1])


def test_accumulated_batches_learn_what_one_large_batch_does(fit, tmp_path):
    whole, lines = fit(tmp_path / "whole", per_device_train_batch_size=12, max_steps=8)
    parts, accumulated = fit(
        tmp_path / "parts", per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=8
    )
    assert losses(accumulated) == pytest.approx(losses(lines), rel=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-3, atol=1e-4)


def test_cached_features_learn_what_online_features_do(fit, tmp_path):
    folder, cached = fit(tmp_path / "cache", features="cache", max_steps=8)
    assert len(list((folder / "features").rglob("*.safetensors"))) == 3
    assert losses(cached) == pytest.approx(losses(fit(tmp_path / "online", max_steps=8)[1]), rel=1e-4)


@pytest.mark.parametrize("stop", [8, 16], ids=["first-epoch", "later-epoch"])
def test_a_continued_fit_is_the_uninterrupted_one_bit_for_bit(fit, tmp_path, monkeypatch, stop):
    whole = fit(tmp_path / "whole", **RESUMED)
    epoch = next(line["step"] for line in whole[1] if "held_out/loss/layer_02" in line)
    assert 8 < epoch < 16
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(stop, patch)
        fit(tmp_path / "parts", **RESUMED)
    assert not (tmp_path / "parts" / "adapter").exists()
    assert_same_fit(whole, fit(tmp_path / "parts", **RESUMED, resume_from_checkpoint="latest"))


def test_a_fit_goes_back_to_a_named_checkpoint(fit, tmp_path):
    folder, lines = fit(tmp_path / "out", **RESUMED)
    before = weights(folder)
    older = str(folder / "checkpoint-8")
    again = fit(folder, **RESUMED | {"save_steps": 10, "save_total_limit": 2}, resume_from_checkpoint=older)
    assert again[1] == lines
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in before.items())
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-10", "checkpoint-20"]


def test_a_complete_fit_says_so_and_ends_well(fit, tmp_path, capsys):
    folder, lines = fit(tmp_path / "out")
    again = fit(folder, resume_from_checkpoint="latest")
    assert "already complete: 4 of 4 steps are done" in capsys.readouterr().out
    assert again[1] == lines


def test_changed_settings_are_refused_with_the_list(fit, tmp_path):
    folder, _ = fit(tmp_path / "out")
    changed = {"learning_rate": 0.5, "head_rank": 5, "save_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(ConfigError) as caught:
        fit(folder, **changed)
    message = str(caught.value)
    assert "head_rank (4 there, 5 now), learning_rate (0.01 there, 0.5 now)" in message
    assert "save_steps" not in message


def test_an_older_run_is_not_overwritten(fit, tmp_path):
    folder, _ = fit(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match="holds checkpoint-4 of an earlier run: continue it with --resume"):
        fit(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "fit_state.json"])
def test_a_damaged_checkpoint_is_named(fit, tmp_path, name):
    folder, _ = fit(tmp_path / "out")
    path = folder / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"checkpoint-4 is (damaged|not a whole checkpoint)"):
        fit(folder, resume_from_checkpoint=str(path.parent))


def test_a_checkpoint_that_would_run_code_is_refused(fit, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    folder, _ = fit(tmp_path / "out")
    torch.save(Evil(), folder / "checkpoint-4" / "optimizer.bin")
    with pytest.raises(ConfigError, match="checkpoint-4 is damaged"):
        fit(folder, resume_from_checkpoint="latest")


def test_only_the_newest_checkpoints_are_kept_and_hold_no_base_rows(fit, tmp_path):
    folder, _ = fit(tmp_path / "out", head="lora", save_steps=1, save_total_limit=2)
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]
    saved = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)


KILL = """
import os, signal, sys
from accelerate import Accelerator
from train.fit_exits import run

save = Accelerator.save_state
def save_and_die(self, folder, **options):
    save(self, folder, **options)
    if folder.endswith("-8"):
        os.remove(os.path.join(folder, "optimizer.bin"))
        os.kill(os.getpid(), signal.SIGKILL)
Accelerator.save_state = save_and_die
run(sys.argv[1:])
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(fit, tmp_path, make_recipe):
    whole = fit(tmp_path / "whole", **RESUMED)
    settings = make_recipe(tmp_path / "killed", **RESUMED)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    killed = subprocess.run([sys.executable, "-c", KILL, "--config", str(recipe)], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = tmp_path / "killed"
    assert (folder / ".checkpoint-8").exists()
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-4"]
    assert_same_fit(whole, fit(folder, **RESUMED, resume_from_checkpoint="latest"))
    assert not (folder / ".checkpoint-8").exists()


def test_latest_without_a_checkpoint_starts_at_the_first_step(fit, tmp_path):
    assert_same_fit(fit(tmp_path / "a"), fit(tmp_path / "b", resume_from_checkpoint="latest"))


def test_trackers_get_the_figures(fit, tmp_path):
    folder, _ = fit(tmp_path / "out", report_to=["tensorboard"], logging_steps=1)
    assert list((folder / "specbound").glob("events.out.*"))


def test_a_metrics_log_drops_what_a_cut_off_run_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fit/loss": 3.0}\n{"step": 2, "fit/loss": 2.0}\n{"step": 3, "fi')
    log = MetricsLog(path, step=1)
    log.write(2, {"fit/loss": 2.5})
    assert [json.loads(line)["fit/loss"] for line in path.read_text().splitlines()] == [3.0, 2.5]
    MetricsLog(path, step=0)
    assert path.read_text() == ""


def test_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path):
    for name in (".checkpoint-3", "checkpoint-12", "checkpoint-4", "checkpoint-old", "checkpoint-7"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-7":
            (tmp_path / name / "fit_state.json").write_text("{}")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-12"]


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
    assert [step for step in range(1, 11) if found.ends_epoch(step)] == [5, 10]


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
