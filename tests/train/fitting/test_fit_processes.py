"""Fits as their launchers start them: one process, two over gloo, DeepSpeed ZeRO-2, a base spread by
FSDP or ZeRO-3; all the same losses.

Those of several processes are stopped by a signal to one of them, and go on. Most launchers run in forks, the first of
a kind as a program.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime import load_specbound
from runtime.adapter.folder import load_adapter
from runtime.errors import ConfigError
from tests.helpers.fits import losses as losses_of
from tests.helpers.paths import ROOT
from tests.helpers.programs import forks
from train.fitting.checkpoints import find_checkpoints

SCRIPT = str(ROOT / "train" / "fit_exits.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
CPU = {"ACCELERATE_USE_CPU": "true"}
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None
WHY = "needs deepspeed, and a compiler for its CPU communication"


STOP = """
import os, signal, sys
from train.fit_exits import run
from train.fitting.learner import Learner

learn = Learner.learn
def learn_and_stop(self, text, *, step, learning_rate):
    values = learn(self, text, step=step, learning_rate=learning_rate)
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return values
Learner.learn = learn_and_stop
run(sys.argv[1:])
"""


# The second process is less sure of every draft; another device may make it so in the last bits.
DIFFER = """
import os, sys
from runtime.decoding.drafter import HeadDrafter
from train.fit_exits import run

propose_all = HeadDrafter.propose_all
def less_sure(self, layer, asks):
    found = propose_all(self, layer, asks)
    return [[[(token, sure / 2) for token, sure in one] for one in each] for each in found]
if os.environ["RANK"] == "1":
    HeadDrafter.propose_all = less_sure
run(sys.argv[1:])
"""


def as_program(command: list[str], *, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As a user starts it; both streams in one."""
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def run_group(command: list[str], environment: dict[str, str], *, stopped: bool = False, run=forks.run) -> str:
    """Run a launcher that must succeed, or be stopped; returns what it printed."""
    ended = run(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    assert (ended.returncode != 0) == stopped, ended.stdout
    return ended.stdout


@pytest.fixture(scope="module")
def launch(make_recipe, tmp_path_factory, tiny_base):
    """`launch(command, environment, **settings)`: run a fit; its losses, one a step, and all it printed."""

    def start(
        command: list[str],
        environment: dict[str, str],
        *,
        stopped: bool = False,
        program: str = "",
        run=forks.run,
        **settings,
    ) -> tuple[list[float], str]:
        folder, script = tmp_path_factory.mktemp("fit"), SCRIPT
        environment = environment | ({"PYTHONPATH": str(ROOT)} if program else {})
        if program:
            script = str(folder / "program.py")
            Path(script).write_text(program)
        (folder / "recipe.yaml").write_text(json.dumps(make_recipe(folder / "out", max_steps=6, **settings)))
        flags = ["--config", str(folder / "recipe.yaml")]
        if stopped:
            (folder / "stop.py").write_text(STOP)
            path = {"PYTHONPATH": str(ROOT)}
            printed = run_group([*command, str(folder / "stop.py"), *flags], environment | path, stopped=True)
            assert "stopped after step 3: --resume_from_checkpoint latest goes on" in printed
            assert "exitcode  : 143" in printed
            assert [path.name for path in find_checkpoints(folder / "out")] == ["checkpoint-3"]
            flags += ["--resume_from_checkpoint", "latest"]
        printed = run_group([*command, script, *flags], environment, run=run)
        assert_generates(folder / "out" / "adapter", settings.get("model_name_or_path", tiny_base))
        assert load_adapter(folder / "out" / "adapter").config.exit_layers == (2, 4)
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        return [line["fit/loss"] for line in lines], printed

    return start


def assert_generates(adapter: Path, base: Path) -> None:
    """The consolidated adapter drafts, and the tokens are plain generate's."""
    model = load_specbound(adapter, base)
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with model.specbound.disabled():
        plain = model.generate(**text, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**text, max_new_tokens=8, do_sample=False), plain)


@pytest.fixture(scope="module")
def alone(launch):
    """Losses of one process under `accelerate launch`."""
    config = ["--config_file", str(ROOT / "configs/accelerate/cpu.yaml")]
    losses, printed = launch([*ACCELERATE, *config], {}, run=as_program)
    assert "1 process(es) on cpu" in printed
    for chatter in ("[RANK", "Saving current state", "real_accelerator"):
        assert chatter not in printed
    for bar in ("fit", "calibrate", "tune"):
        assert f"{bar}: " in printed
    return losses


def test_two_processes_learn_what_one_does(launch, alone):
    losses, printed = launch(TORCHRUN, CPU, stopped=True, per_device_train_batch_size=4)
    assert "2 process(es) on cpu" in printed
    assert losses == pytest.approx(alone, rel=1e-4)


def test_two_processes_that_diverge_say_so_together(make_recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(make_recipe(tmp_path / "out", learning_rate=1.0)))
    printed = run_group(
        [*TORCHRUN, SCRIPT, "--config", str(tmp_path / "recipe.yaml")], CPU, stopped=True, run=as_program
    )
    said = re.findall(r"error: the fit diverges: [^\n]*", printed)
    assert said and len(set(said)) == 1 and 'Traceback (most recent call last):\n  File "' + SCRIPT not in printed
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.skipif(NO_DEEPSPEED, reason=WHY)
def test_two_processes_under_zero_2_learn_what_one_does(launch, alone):
    config = ["--config_file", str(ROOT / "configs/accelerate/zero2_cpu.yaml"), "--main_process_port", "0"]
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    losses, printed = launch([*ACCELERATE, *config], {}, stopped=True, **sizes)
    assert "2 process(es) on cpu" in printed
    assert losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("zero3", "DeepSpeed ZeRO-3")])
def test_two_processes_with_a_part_of_the_base_each_learn_what_one_does(
    launch, quick_fit, tmp_path, make_model, make_tokenizer, name, kind
):
    """The corpus too is made by the base that is spread; its embedding is its unembedding, as in most small bases.

    They run it equally often, also where the second would draft otherwise: what the first drafts holds for both.
    """
    if name == "zero3" and NO_DEEPSPEED:
        pytest.skip(WHY)
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    settings = {"model_name_or_path": str(tmp_path / "tied"), "corpus_dir": None, "sample_fraction": 0.3}
    settings |= {"exit_threshold": 0.1, "max_draft_tokens": 4}  # so that there are drafts
    expected = losses_of(quick_fit(tmp_path / "alone", max_steps=6, **settings)[1])
    config = ["--config_file", str(ROOT / "configs/accelerate" / f"{name}.yaml"), "--main_process_port", "0"]
    config += ["--num_processes", "2", "--mixed_precision", "no"]
    settings |= {"per_device_train_batch_size": 4}
    run = as_program if name == "zero3" else forks.run  # a forked process of ZeRO-3 does not come to its end
    losses, printed = launch([*ACCELERATE, *config], CPU, program=DIFFER, run=run, **settings)
    assert f"the base is spread over the processes by {kind}" in printed and "2 process(es) on cpu" in printed
    assert losses == pytest.approx(expected, rel=1e-4)


def test_cached_features_of_a_base_that_is_spread_are_refused(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="features: cache cannot be had with a base spread by FSDP: use"):
        fit(tmp_path / "out", features="cache")
