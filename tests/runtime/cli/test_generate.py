"""`specbound generate` and `specbound chat`: stock's text, for people, programs and pipes; Ctrl-C; completion."""

import json
import os
import re
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from runtime import save_adapter
from runtime.cli.view import RoundsView
from runtime.stats import SpeculationStats
from runtime.text.transcript import Round, Token, Written
from train.cli.app import app

FLOAT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any, make_model: Any, make_tokenizer: Any, make_adapter: Any) -> tuple[Path, Path]:
    """A base with a chat template, and an adapter for it."""
    root = tmp_path_factory.mktemp("text")
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    save_adapter(make_adapter(model, tokenizer, base_model_name_or_path=str(root / "base")), root / "adapter")
    return root / "base", root / "adapter"


def run(folders: tuple[Path, Path], verb: str, *arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [verb, "--adapter", str(folders[1]), *FLOAT, *arguments], input=stdin)


def stock(folders: tuple[Path, Path], make_tokenizer: Any, text: str, **options: Any) -> tuple[list[int], str]:
    """Ids and text of plain `generate` on the same base."""
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    found = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    return found, tokenizer.decode(found, skip_special_tokens=True)


def test_generate(folders: Any, make_tokenizer: Any) -> None:
    ids, text = stock(folders, make_tokenizer, "w9 w3 w77", max_new_tokens=12, do_sample=False)
    for arguments, stdin in ((["w9 w3 w77"], None), ([], "w9 w3 w77\n"), (["-"], "w9 w3 w77")):
        result = run(folders, "generate", "--max-new-tokens", "12", *arguments, stdin=stdin)
        assert (result.exit_code, result.stdout, result.stderr) == (0, text + "\n", "")
    torch.manual_seed(7)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    ids, text = stock(folders, make_tokenizer, "w9 w3 w77", **options)
    sampling = ["--sample", "--temperature", "0.8", "--top-p", "0.9", "--seed", "7"]
    result = run(folders, "generate", "--json", "--max-new-tokens", "12", *sampling, "w9 w3 w77")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (found["tokens"], found["text"], found["prompt_tokens"]) == (ids, text, 3)
    assert found["finish_reason"] == "length" and found["statistics"]["emitted"] == 12
    assert found["certificate"].startswith("bit for bit equal")
    words = text.split()
    result = run(
        folders, "generate", "--max-new-tokens", "12", *sampling, "--stop", f"{words[4]} ", "--raw", "w9 w3 w77"
    )
    assert result.stdout == text.partition(f"{words[4]} ")[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], "", "the prompt is empty"),
        (["w1", "--temperature", "0.5"], None, "temperature is of sampling: add --sample"),
        (["w1", "--stop", ""], None, "--stop is empty"),
        (["w1", "--model", "/nowhere"], None, "the folder /nowhere of the base does not exist"),
        (["w1 " * 600], None, "this model takes 1 to 511"),
    ],
)
def test_generate_says_what_is_wrong(folders: Any, arguments: list[str], stdin: str | None, said: str) -> None:
    result = run(folders, "generate", *arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and said in result.stderr and result.stderr.count("\n") == 1
    found = run(folders, "generate", "--json", *arguments, stdin=stdin)
    assert found.exit_code == 1 and said in json.loads(found.stdout)["error"]


def test_chat_from_a_pipe(folders: Any, make_tokenizer: Any) -> None:
    """Turns see what was said before; /reset forgets it; answers alone are on stdout."""
    how = {"max_new_tokens": 6, "do_sample": False}
    _, first = stock(folders, make_tokenizer, "w9", **how)
    _, second = stock(folders, make_tokenizer, f"w9 {first} w3", **how)
    typed = "w9\n\nw3\n/nonsense\n/reset\nw9\n/exit\nw9\n"
    result = run(folders, "chat", "--max-new-tokens", "6", stdin=typed)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert result.stderr == "error: the commands are /reset and /exit\n"
    result = run(folders, "chat", "--max-new-tokens", "6", "--system", "w40", stdin="w1 " * 600 + "\nw9\n")
    assert "this model takes" in result.stderr
    assert result.stdout == stock(folders, make_tokenizer, "w40 w9", **how)[1] + "\n"


def test_chat_shows_its_drafts(folders: Any, make_tokenizer: Any) -> None:
    _, text = stock(folders, make_tokenizer, "w9", max_new_tokens=20, do_sample=False)
    result = run(folders, "chat", "--show", "--max-new-tokens", "20", stdin="w9\n")
    legend, answer, figures = result.stdout.splitlines()[:3]
    assert legend == "drafted by layer 2, layer 4, or by nobody; ~rejected~"
    assert re.sub(" ~[^~]*~", "", answer) == text and "~" in answer
    assert figures.startswith("(20 tokens, ") and "of drafts accepted" in result.stdout


class Words:
    """A tokenizer of ids."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" d{index}" for index in ids)


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_of_a_round(terminal: bool) -> None:
    """One accepted by layer 4, one rejected, one the target's own; a broken line; then plain tokens."""
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, color_system="standard" if terminal else None, width=60)
    view = RoundsView(console, Words(), [0, 4])
    with view:
        for event in (
            Token(1, "one"),
            Token(2, " two"),
            Token(3, " three\nfour"),
            Round([2, 9], [0, 1], [4, 0], [0], 2),
        ):
            view.show(event)
        for number in range(40):  # plain decoding has no rounds
            view.show(Token(number, f" t{number}"))
    view.summarize(Written("stop", SpeculationStats(emitted=43, seconds=2.0), False))
    shown = out.getvalue()
    assert "21.5 tokens/s" in shown
    if terminal:
        assert "\x1b[32m two\x1b[0m" in shown and "\x1b[2;9md9\x1b[0m" in shown
        assert "t39" in shown
    else:
        first, second = shown.splitlines()[:2]
        assert first == "one two ~d9~ three"
        assert shown.replace("\n", "").startswith("one two ~d9~ threefour" + "".join(f" t{n}" for n in range(40)))
        assert second.startswith("four t0")


def test_words_stay_whole() -> None:
    """A draft rejected inside a word is shown after it, not those behind it; lines end between words."""
    out = StringIO()
    with RoundsView(Console(file=out, force_terminal=True, color_system=None, width=24), Words(), [4]) as view:
        for number in range(12):
            for event in (Token(1, " medi"), Token(2, "terranean"), Round([7, 9, 8], [0, 1, 2], [4, 4, 4], [0], 2)):
                view.show(event)
            if number % 2:
                view.show(Token(3, "s"))
    words = {"mediterranean", "mediterraneans", "d9"}
    final = out.getvalue().rpartition("\x1b[2K")[2].replace("\x1b[?25h", "")
    assert set(final.split()) == words and final.count("d9") == 12
    assert all(len(line.rstrip()) <= 24 for line in final.splitlines())


def test_ctrl_c(folders: Any) -> None:
    """In the middle of an answer: exit code 130, no traceback."""
    command = [sys.executable, "-m", "train.cli.app", "generate", "--adapter", str(folders[1]), *FLOAT]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "500", "w9"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run behind a shell
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert error == b"" and out.endswith(b"\n") and len(out.split()) < 500


def test_completion_and_help() -> None:
    """The shell is told of the verbs; each verb's help has an example where it has a task."""
    asked = {"_SPECBOUND_COMPLETE": "complete_bash", "COMP_WORDS": "specbound ge", "COMP_CWORD": "1"}
    block = "import sys; sys.argv[0] = 'specbound'; sys.modules.update(dict.fromkeys(('torch', 'transformers')));"
    found = subprocess.run(
        [sys.executable, "-c", block + "from train.cli.app import app; app(prog_name='specbound')"],
        capture_output=True, text=True, env=os.environ | asked, check=False,
    )  # fmt: skip
    assert found.stdout.split() == ["generate"], found.stderr
    for verb in ("generate", "chat", "serve", "audit", "profile", "tune", "bench"):
        result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0 and f"specbound {verb}" in result.stdout, verb
    assert "Exit codes" in CliRunner().invoke(app, ["--help"]).stdout
    assert CliRunner().invoke(app, ["generate", "--max-new-tokens", "0", "--adapter", "a", "w"]).exit_code == 2


def test_a_file_of_prompts(folders: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Each answer is stock's, in the order of the file; a cut line and missing answers are made anew, others kept."""
    texts = ["w9 w3 w77", "w5 w6 w7 w8", "w1 w2", "w9 w3 w77"]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    options = ("--file", str(prompts), "--output", str(output), "--max-new-tokens", "12", "--concurrency", "3")
    result = run(folders, "generate", *options)
    assert result.exit_code == 0 and result.stdout == f"4 answers added to {output}\n", result.output
    rows = {row["index"]: row for row in map(json.loads, output.read_text(encoding="utf-8").splitlines())}
    for number, text in enumerate(texts):
        ids, answer = stock(folders, make_tokenizer, text, max_new_tokens=12, do_sample=False)
        assert (rows[number]["tokens"], rows[number]["text"]) == (ids, answer)
    whole = output.read_text(encoding="utf-8").splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in whole] == [0, 1, 2, 3]
    output.write_text(whole[2] + whole[1] + whole[3][:9], encoding="utf-8")
    assert run(folders, "generate", *options).stdout == f"2 answers added to {output}\n"
    assert output.read_text(encoding="utf-8").splitlines(keepends=True) == whole
    prompts.write_text(json.dumps({"prompt": "w4"}) + "\n", encoding="utf-8")
    result = run(folders, "generate", *options)
    assert result.exit_code == 1 and "holds answers to other prompts" in result.stderr


@pytest.mark.parametrize("wrong", [("--file", "x.jsonl"), ("--file", "x.jsonl", "--output", "y.jsonl", "w4")], ids=str)
def test_a_file_goes_with_an_output_alone(folders: Any, wrong: tuple[str, ...]) -> None:
    result = run(folders, "generate", *wrong)
    assert result.exit_code == 1 and "--file goes with --output" in result.stderr
