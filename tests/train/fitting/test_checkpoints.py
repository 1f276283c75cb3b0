"""Checkpoints: damaged, foreign, best, and written whole or not at all."""

import errno
import json
import signal
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from runtime.errors import ConfigError
from tests.helpers.fits import assert_same_fit, weights
from tests.helpers.paths import ROOT
from tests.helpers.programs import forks
from train.fitting.checkpoints import STATE_FILE, best_checkpoint, find_checkpoints
from train.fitting.log import MetricsLog

EPOCH = 10  # steps of an epoch of the tiny recipe
RESUMED = {"max_steps": 26, "save_steps": 3, "save_total_limit": 99}


def names(folder) -> list[str]:
    return [path.name for path in find_checkpoints(folder)]


def damage(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", STATE_FILE])
def test_latest_passes_over_a_damaged_checkpoint_by_name(quick_fit, tmp_path, caplog, name):
    settings = {"save_steps": 2, "save_total_limit": 9}
    folder, lines = quick_fit(tmp_path / "out", **settings)
    damage(folder / "checkpoint-4" / name)
    with pytest.raises(ConfigError, match=r"checkpoint-4 is (damaged|not a whole checkpoint) \(.*: name another"):
        quick_fit(folder, **settings, resume_from_checkpoint=str(folder / "checkpoint-4"))
    again = quick_fit(folder, **settings, resume_from_checkpoint="latest")
    assert [record for record in caplog.messages if "checkpoint-4 is" in record and "passed over" in record]
    assert again[1] == lines
    quick_fit(folder, **settings, resume_from_checkpoint=str(folder / "checkpoint-4"))  # written anew


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(quick_fit, tmp_path, monkeypatch):
    save = Accelerator.save_state

    def fail(self, folder, **options):
        if folder.endswith("-6"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", fail)
        with pytest.raises(ConfigError, match=r"checkpoint-6 cannot be written in .*; \d+ bytes free\): make room"):
            quick_fit(tmp_path / "out", **RESUMED)
    assert names(tmp_path / "out") == ["checkpoint-3"]
    _, lines = quick_fit(tmp_path / "out", **RESUMED, resume_from_checkpoint="latest")
    assert [line["step"] for line in lines] == list(range(1, 27))


def test_bytes_that_changed_are_noticed(quick_fit, tmp_path):
    folder, _ = quick_fit(tmp_path / "out")
    path = folder / "checkpoint-4" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"damaged \(model.safetensors is not what was written\)"):
        quick_fit(folder, resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("content", [b"", b"[]", b'"x"', b'{"step": 4}', b"\xff"])
def test_no_whole_checkpoint_is_no_silent_start(quick_fit, tmp_path, content):
    folder, _ = quick_fit(tmp_path / "out")
    (folder / "checkpoint-4" / STATE_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole: start anew in another output_dir"):
        quick_fit(folder, resume_from_checkpoint="latest")


def test_a_checkpoint_that_would_run_code_is_refused(quick_fit, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    folder, _ = quick_fit(tmp_path / "out")
    torch.save(Evil(), folder / "checkpoint-4" / "optimizer.bin")
    monkeypatch.setattr("train.fitting.checkpoints._damage", lambda folder, **options: None)  # one made with care
    with pytest.raises(ConfigError, match="checkpoint-4 is damaged"):
        quick_fit(folder, resume_from_checkpoint="latest")


def test_only_the_newest_and_the_best_are_kept_and_hold_no_base_rows(quick_fit, tmp_path, monkeypatch):
    speeds = iter([1.5, 1.9, 1.2])  # by epoch

    def figures(*rest):
        return {"held_out/accepted_length": 1.0, "held_out/predicted_speedup": next(speeds)}

    monkeypatch.setattr("train.replay.simulation.Simulation.figures", figures)
    settings = {"head": "lora", "max_steps": 26, "save_steps": 5, "save_total_limit": 2}
    folder, _ = quick_fit(tmp_path / "out", **settings)
    assert names(folder) == [f"checkpoint-{2 * EPOCH}", "checkpoint-26"]
    assert best_checkpoint(find_checkpoints(folder)).name == f"checkpoint-{2 * EPOCH}"
    saved = load_file(folder / "checkpoint-26" / "model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)


def test_the_adapter_is_made_from_the_best_checkpoint(quick_fit, tmp_path, monkeypatch, capsys):
    def judged(speeds):
        found = iter(speeds)
        figures = lambda *rest: {"held_out/accepted_length": 1.0, "held_out/predicted_speedup": next(found)}  # noqa: E731
        monkeypatch.setattr("train.replay.simulation.Simulation.figures", figures)

    def made_from(folder):
        steps = [EPOCH, 2 * EPOCH, 26]
        states = {step: load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in steps}
        made = weights(folder)
        return [step for step in steps if all(torch.equal(made[name], states[step][name]) for name in made)]

    settings = {"max_steps": 26, "save_steps": EPOCH, "save_total_limit": 3}
    judged([1.5, 1.9, 1.2])
    folder, _ = quick_fit(tmp_path / "out", **settings)
    assert made_from(folder) == [20]
    assert "from step 20 of 26, the best: 1.90x by layer counts" in capsys.readouterr().out
    settings["resume_from_checkpoint"] = "latest"
    quick_fit(folder, **settings, load_best_model_at_end=False)
    assert made_from(folder) == [26]
    damage(folder / "checkpoint-20" / "model.safetensors")
    quick_fit(folder, **settings)
    assert "from step 10 of 26" in capsys.readouterr().out
    judged([1.5, 1.9, 1.9])  # of equals the newest
    folder, _ = quick_fit(tmp_path / "equal", **settings)
    assert made_from(folder) == [26]


KILL = """
import os, signal, sys
from accelerate import Accelerator
from train.fit_exits import run

save = Accelerator.save_state
def save_and_die(self, folder, **options):
    save(self, folder, **options)
    if folder.endswith("-9"):
        os.remove(os.path.join(folder, "optimizer.bin"))
        os.kill(os.getpid(), signal.SIGKILL)
Accelerator.save_state = save_and_die
run(sys.argv[1:])
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_older_one(quick_fit, tmp_path, make_recipe):
    whole = quick_fit(tmp_path / "whole", **RESUMED)
    settings = make_recipe(tmp_path / "killed", **RESUMED)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    (tmp_path / "kill.py").write_text(KILL)
    killed = forks.run([sys.executable, str(tmp_path / "kill.py"), "--config", str(recipe)])
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    folder = tmp_path / "killed"
    assert (folder / ".checkpoint-9").exists()
    assert names(folder) == ["checkpoint-3", "checkpoint-6"]
    assert_same_fit(whole, quick_fit(folder, **RESUMED, resume_from_checkpoint="latest"))
    assert not (folder / ".checkpoint-9").exists()


def test_a_kill_at_every_write_of_a_checkpoint_leaves_the_old_or_the_new_state(tmp_path):
    program = [sys.executable, str(ROOT / "tests" / "helpers" / "programs" / "kill_points.py"), str(tmp_path)]
    ended = forks.run(program)
    assert ended.returncode == 0, ended.stdout
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert found[-1]["point"] == "whole" and all(entry["status"] == 9 for entry in found[:-1])
    assert {"half of model.safetensors", "replace", "os.rename .checkpoint-2"} <= {entry["point"] for entry in found}
    assert len(found) > 20
    steps = [entry["step"] for entry in found]
    assert steps == sorted(steps) and set(steps) == {1, 2}  # the old one first, and then the new one
    assert all(entry["weight"] == [entry["step"]] for entry in found)
    assert all(entry["left"] == ["checkpoint-3"] for entry in found)  # the next save clears up


def test_latest_without_a_checkpoint_starts_at_the_first_step(quick_fit, tmp_path):
    assert_same_fit(quick_fit(tmp_path / "a"), quick_fit(tmp_path / "b", resume_from_checkpoint="latest"))


def test_a_metrics_log_drops_what_a_cut_off_run_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "fit/loss": 3.0}\n{"step": 2, "fit/loss": 2.0}\n{"step": 3, "fi')
    log = MetricsLog(path, step=1)
    log.write(2, {"fit/loss": 2.5})
    assert [json.loads(line)["fit/loss"] for line in path.read_text().splitlines()] == [3.0, 2.5]
    MetricsLog(path, step=0)
    assert path.read_text() == ""


def test_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path):
    for name in (".checkpoint-3", "checkpoint-12", "checkpoint-4", "checkpoint-old", ".checkpoint-7-removed"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-12"]
