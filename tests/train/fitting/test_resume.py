"""Fits that are stopped, killed, damaged and continued: the same losses, weights and texts, bit for bit."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import train.fitting.loop
from runtime.errors import ConfigError
from tests.helpers.fits import after_step, assert_same_fit, weights
from train.fit_exits import run
from train.fitting.checkpoints import find_checkpoints

EPOCH = 10  # steps of an epoch of the tiny recipe
RESUMED = {"max_steps": 26, "save_steps": 3, "save_total_limit": 99}


class Killed(BaseException):
    """Nobody catches it, so that nothing is saved on the way out."""


def die():
    raise Killed


def names(folder) -> list[str]:
    return [path.name for path in find_checkpoints(folder)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the uninterrupted fit is, and what was found of it once it is made."""
    return tmp_path_factory.mktemp("whole"), []


@pytest.fixture
def whole(made, quick_fit, monkeypatch):
    """The uninterrupted fit, made once: folder and lines, and the text of every step."""
    folder, found = made
    if not found:
        with monkeypatch.context() as patch:
            seen = after_step(patch, -1, die)
            found.append((quick_fit(folder / "out", **RESUMED), seen))
    return found[0]


@pytest.mark.parametrize(
    "kills", [[8], [20], [EPOCH], [EPOCH + 1], [2], [5, 8], [EPOCH + 4, EPOCH + 8]], ids=lambda kills: f"{kills}"
)
def test_a_killed_fit_that_goes_on_is_the_uninterrupted_one(whole, quick_fit, tmp_path, monkeypatch, kills):
    whole, expected = whole
    assert [line["step"] for line in whole[1] if "held_out/chance" in line] == [EPOCH, 2 * EPOCH, 26]
    seen = {}
    for kill in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            now = after_step(patch, kill, die)
            quick_fit(tmp_path / "parts", **RESUMED, resume_from_checkpoint="latest")
        seen |= now
    assert not (tmp_path / "parts" / "adapter").exists()
    with monkeypatch.context() as patch:
        now = after_step(patch, -1, die)
        again = quick_fit(tmp_path / "parts", **RESUMED, resume_from_checkpoint="latest")
    assert min(now) == max(step for step in (0, EPOCH, *range(3, 26, 3)) if step < kills[-1])
    assert seen | now == expected
    assert_same_fit(whole, again)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_leaves(make_recipe, whole, quick_fit, tmp_path, monkeypatch, number, code):
    """A second signal, as launchers send it after the terminal's, changes nothing."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(tmp_path / "parts", **RESUMED)))
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        after_step(patch, 8, lambda: [os.kill(os.getpid(), each) for each in (number, signal.SIGTERM)])
        run(["--config", str(recipe)])
    assert caught.value.code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert names(tmp_path / "parts") == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert not (tmp_path / "parts" / "adapter").exists()
    assert_same_fit(whole[0], quick_fit(tmp_path / "parts", **RESUMED, resume_from_checkpoint="latest"))


def test_a_signal_before_the_first_step_ends_at_once(make_recipe, quick_fit, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(tmp_path / "out")))
    monkeypatch.setattr("train.fit_exits.make_corpus", lambda *rest, **options: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        run(["--config", str(recipe)])
    assert caught.value.code == 143
    assert not (tmp_path / "out").exists()


def test_a_signal_after_the_last_look_is_not_lost(make_recipe, quick_fit, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(tmp_path / "out")))
    save = train.fitting.loop.save_checkpoint

    def save_and_stop(*arguments, **options):
        save(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train.fitting.loop, "save_checkpoint", save_and_stop)
        run(["--config", str(recipe)])
    assert caught.value.code == 143
    assert names(tmp_path / "out") == ["checkpoint-4"] and not (tmp_path / "out" / "adapter").exists()


def test_a_fit_goes_back_to_a_named_checkpoint(quick_fit, tmp_path):
    folder, lines = quick_fit(tmp_path / "out", **RESUMED)
    before = weights(folder)
    older = str(folder / "checkpoint-9")
    changed = RESUMED | {"save_steps": 10, "save_total_limit": 2}
    again = quick_fit(folder, **changed, resume_from_checkpoint=older)
    assert again[1] == lines
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in before.items())
    kept = find_checkpoints(folder)
    assert kept[-1].name == "checkpoint-26" and len(kept) == 2


def test_a_complete_fit_says_so_and_ends_well(quick_fit, tmp_path, capsys):
    folder, lines = quick_fit(tmp_path / "out")
    again = quick_fit(folder, resume_from_checkpoint="latest")
    assert "already complete: 4 of 4 steps are done" in capsys.readouterr().out
    assert again[1] == lines


def test_changed_settings_are_refused_with_the_list(quick_fit, tmp_path):
    folder, _ = quick_fit(tmp_path / "out")
    changed = {"learning_rate": 0.5, "head_rank": 5, "save_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(ConfigError) as caught:
        quick_fit(folder, **changed)
    message = str(caught.value)
    assert "head_rank (4 there, 5 now), learning_rate (0.01 there, 0.5 now)" in message
    assert "save_steps" not in message


def test_a_corpus_of_other_prompts_is_refused(quick_fit, tmp_path, make_recipe):
    prompts = tmp_path / "prompts.jsonl"
    lines = Path(make_recipe(tmp_path)["prompts"][0]).read_text().splitlines()
    prompts.write_text("\n".join(lines))
    quick_fit(tmp_path / "out", prompts=[str(prompts)], corpus_dir=str(tmp_path / "a"))
    prompts.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"made with other settings: corpus \('\w+' there, '\w+' now\);"):
        quick_fit(
            tmp_path / "out", prompts=[str(prompts)], corpus_dir=str(tmp_path / "b"), resume_from_checkpoint="latest"
        )


def test_an_older_run_is_not_overwritten(quick_fit, tmp_path):
    folder, _ = quick_fit(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match="holds checkpoint-4 of an earlier run: continue it with --resume"):
        quick_fit(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
