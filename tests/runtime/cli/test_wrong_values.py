"""The command line with what a user can get wrong: one line that says what to do, exit code 1 or 2, no traceback."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from train.cli.app import app
from train.replay.costs import CostTable

ADAPTER, PROMPTS = "outputs/demo/adapter", "good.jsonl"
GENERATE = ["generate", "--adapter", ADAPTER]
AUDIT = ["audit", "--adapter", ADAPTER, "--prompts"]
BENCH = ["bench", "--adapter", ADAPTER, "--prompts", PROMPTS, "--json"]
KEPT = (PROMPTS, "bad.jsonl", "notes.txt")
TUNE = ["tune", "--adapter", ADAPTER, "--costs"]
NO_BASE, OUTPUT = ["--model", "nowhere"], ["--output", "answers.jsonl"]
# Arguments, and what the line must hold.
WRONG: list[tuple[list[str], str]] = [
    (["generate", "--adapter", "nowhere", "w1"], "nowhere"),
    (["generate", "--adapter", "", "w1"], "adapter is ''"),
    (["generate", "--adapter", "a/b/c", "w1"], "a/b/c does not exist"),
    (["generate", "--adapter", PROMPTS, "w1"], "not a folder"),
    (["generate", "--adapter", "empty", "w1"], "config.json"),
    ([*GENERATE, "--model", "no/such/base", "w1"], "the folder no/such/base of the base does not exist"),
    ([*GENERATE, "--model", "empty", "w1"], "could not be loaded"),
    ([*GENERATE, "--dtype", "bf16", "w1"], "expected one of bfloat16, float32, float16"),
    ([*GENERATE, "--device", "gpu", "w1"], "a device such as 'cuda:0'"),
    ([*BENCH, "b.json", "--device", "cuda:7"], "torch sees no such device"),
    ([*GENERATE, "--exactness", "exact", "w1"], "expected one of bitwise, batched"),
    ([*GENERATE, "--temperature", "0.5", "w1"], "--sample"),
    ([*GENERATE, "--stop", "", "w1"], "--stop is empty"),
    ([*GENERATE, ""], "the prompt is empty"),
    ([*GENERATE, "--threads", "0", "w1"], "threads"),
    ([*GENERATE, "--max-new-tokens", "none", "w1"], "max-new-tokens"),
    (["chat", "--adapter", ADAPTER, "--top-p", "2"], "top-p"),
    (["chat", "--adapter", ADAPTER, "--top-p", "0.5"], "--sample"),
    (["serve", "--adapter", "nowhere", "--port", "0"], "nowhere"),
    (["serve", "--adapter", ADAPTER, "--port", "99999999"], "port"),
    (["serve", "--adapter", ADAPTER, "--port", "0", "--host", "0.0.0.0"], "API key"),
    (["inspect", "empty"], "config.json"),
    (["inspect", ADAPTER, "--revision", "main"], "is a folder"),
    # Files are looked at before a base is loaded.
    ([*GENERATE, *NO_BASE, *OUTPUT, "--file", "bad.jsonl"], "bad.jsonl, line 1: not valid JSON"),
    ([*GENERATE, *NO_BASE, *OUTPUT, "--file", "empty.jsonl"], "empty.jsonl: no prompts in it"),
    ([*GENERATE, *NO_BASE, *OUTPUT, "--file", "costs.json"], "expected a list of rows"),
    ([*GENERATE, *NO_BASE, "--file", PROMPTS, "--output", "notes.txt"], "holds something else than answers"),
    ([*AUDIT, "empty.jsonl", *NO_BASE], "empty.jsonl: no prompts in it"),
    ([*AUDIT, PROMPTS, *NO_BASE, "--json", "bad.jsonl", "--resume"], "not a report of this kind"),
    ([*BENCH[:-2], "empty.jsonl", *NO_BASE, "--json", "b.json"], "empty.jsonl: no prompts in it"),
    ([*BENCH, "bad.jsonl", *NO_BASE, "--resume"], "not a report of this kind"),
    ([*BENCH, "b.json", *NO_BASE, "--costs", "costs.json"], "the costs are of a base of 99 layers"),
    (["data", "empty.jsonl", *NO_BASE], "empty.jsonl: no prompts in it"),
    ([*TUNE, "costs.json", *NO_BASE, "--prompts", PROMPTS], "the costs are of a base of 99 layers"),
    ([*TUNE, "empty.jsonl", *NO_BASE, "--prompts", PROMPTS], "empty.jsonl is not a cost table"),
    ([*AUDIT, "no.jsonl"], "no.jsonl: cannot be read"),
    ([*AUDIT, "some-org/set"], "expected a .jsonl or .json file"),
    ([*AUDIT, PROMPTS, "--temperature", "0.5"], "--sample"),
    ([*AUDIT, PROMPTS, "--sample", "--temperature", "0"], "temperature"),
    ([*AUDIT, "bad.jsonl"], "bad.jsonl, line 1: not valid JSON"),
    ([*AUDIT, PROMPTS, "--json", "bad.jsonl", "--resume"], "not a report of this kind"),
    ([*BENCH, "b.json", "--methods", "magic"], "method 'magic' is unknown"),
    ([*BENCH, f"{PROMPTS}/b.json"], "b.json"),
    ([*BENCH, "b.json", "--costs", "no.json"], "no.json is not a cost table"),
    (["profile", "--adapter", "nowhere", "--json", "c.json"], "nowhere"),
    (["tune", "--adapter", ADAPTER, "--costs", "no.json"], "no.json is not a cost table"),
    (["publish", "empty", "org/name"], "config.json"),
    (["publish", "nowhere", "org/name"], "nowhere"),
    (["plan", "--model", "recurrent", "--gpus", "1x80"], "is not supported"),
    (["plan", "--model", "nowhere/at/all", "--gpus", "1x80"], "nowhere/at/all"),
    (["plan", "--model", "outputs/base/smollm2-135m-instruct", "--gpus", "eight"], "eight"),
]


@pytest.fixture
def here(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny base and its adapter, and files that are good and bad."""
    monkeypatch.chdir(demo_outputs)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("SPECBOUND_API_KEY", raising=False)
    (demo_outputs / PROMPTS).write_text('{"prompt": "w1 w2"}\n')
    (demo_outputs / "bad.jsonl").write_text("{\n")
    (demo_outputs / "empty.jsonl").write_text("\n")
    (demo_outputs / "notes.txt").write_text("not to be lost")
    CostTable.counted(99, head=1.0, unembedding=1.0).write(demo_outputs / "costs.json")
    (demo_outputs / "empty").mkdir()
    (demo_outputs / "recurrent").mkdir()
    (demo_outputs / "recurrent" / "config.json").write_text('{"model_type": "mamba", "architectures": ["M"]}')
    return demo_outputs


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[" ".join(arguments)[:70] for arguments, _ in WRONG])
def test_every_wrong_value_is_told_in_one_line(arguments: list[str], said: str, here: Path) -> None:
    """On stderr; nothing is left behind."""
    before = sorted(path for path in here.rglob("*") if "base" not in path.parts)
    kept = [(here / name).read_bytes() for name in KEPT]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), repr(result.exception)
    assert "Traceback" not in result.output
    if result.exit_code == 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said in errors[0], result.output
    else:  # wrong usage, in a box of the command line's own
        assert said in result.stderr, result.output
    assert sorted(path for path in here.rglob("*") if "base" not in path.parts) == before
    assert [(here / name).read_bytes() for name in KEPT] == kept
