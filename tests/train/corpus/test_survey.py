"""`specbound data`: what it counts is what the corpus will hold, in a table, as JSON and as a picture."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tests.helpers.corpora import OPTIONS, record, rows, run
from train.cli.app import app
from train.corpus.collection import Collection
from train.planning.survey import Survey

WIDE = {"COLUMNS": "300"}
ROWS = [
    {"messages": [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]},
    *({"conversations": [
        {"from": "human", "value": f"w{n}"}, {"from": "gpt", "value": "w4 " * n},
        {"from": "human", "value": "w5 w6"}, {"from": "gpt", "value": "w7"},
    ]} for n in range(1, 20)),
    {"prompt": "w1 " * 60, "response": "w2"},
    {"prompt": "w9 </s> w8", "response": "w2"},
    {"prompt": "w9 </s> w8", "response": "w3"},
    {"nothing": 1},
]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize("keep", [True, False])
def test_it_counts_what_the_corpus_will_hold(model, tokenizer, tmp_path, source, keep):
    """With given answers even the lengths are those of the corpus."""
    read = Collection.read(source, keep=keep)
    survey = Survey.of(read, tokenizer, OPTIONS, keep=keep)
    given = read.conversations if keep else None
    folder = run(model, tokenizer, read.prompts, tmp_path / "c", given=given, skipped=read.skipped)
    counts, found = record(folder)["counts"], rows(folder)
    assert (survey.skipped, survey.duplicates, survey.too_long) == (
        counts["skipped"], counts["duplicates"], counts["too_long"]
    )  # fmt: skip
    assert survey.conversations == counts["prompts"] and len(survey.prompts) == len(found) + survey.too_long
    assert survey.special == {"</s>": 1} and survey.systems == (0 if keep else 1)
    if keep:
        short = sorted(length for length in survey.prompts if length <= OPTIONS.max_prompt_tokens)
        assert short == sorted(len(row["prompt_ids"]) for row in found)
        assert survey.cut == 13 and len(survey.answers) == sum(len(one.answers) for one in given) - 1
    assert sum(survey.splits.values()) == len(found)


def test_nothing_is_counted_where_nothing_is_amiss(tokenizer, tmp_path):
    """Negative control."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "w1"}\n')
    survey = Survey.of(Collection.read(str(tmp_path / "a.jsonl")), tokenizer, OPTIONS)
    assert not (survey.skipped or survey.duplicates or survey.too_long or survey.special or survey.answers)
    assert survey.as_json()["answers"] is None and survey.as_json()["prompts"]["mean"] == survey.prompts[0]
    plain = Survey.of(Collection.read(str(tmp_path / "a.jsonl")), tokenizer, replace(OPTIONS, chat_template="none"))
    assert plain.prompts == [1]


@pytest.fixture
def data(model, tokenizer, tmp_path, source):
    """`data(*options)`: run the verb on the rows."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def invoke(*options: str):
        return CliRunner().invoke(app, ["data", source, "--model", str(tmp_path / "base"), *options], env=WIDE)

    return invoke


def test_the_verb_tells_it(data, tmp_path):
    found = data("--answers", "keep", "--max-prompt-tokens", "40", "--picture", str(tmp_path / "lengths.png"))
    assert found.exit_code == 0, found.stderr
    for part in (
        "no answer in it",
        "1 prompts above",
        "</s> in 1",
        "assistant: w4",
        "19 with 2",
        "median",
        "as the base reads it",
    ):
        assert part in found.stdout, (part, found.stdout)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_as_json(data):
    figures = json.loads(data("--json", "--examples", "1").stdout)
    assert figures["rows"] == len(ROWS) and figures["skipped"] == {"no prompt in it": 1}
    assert figures["prompts"]["100%"] > 60 and len(figures["examples"]) == 1


def test_what_cannot_be_looked_at_is_one_line(data):
    for options, expected in (
        (("--answers", "all"), "expected distil or keep"),
        (("--chat-template", "chatml"), "expected auto or none"),
    ):
        found = data(*options)
        assert found.exit_code == 1 and expected in found.stderr and found.stderr.count("\n") == 1


def test_an_example_is_shown_as_the_base_reads_it(tokenizer, source):
    """The first prompt, ready to be answered; with kept answers all that is learnt."""
    first, second = (Survey.of(Collection.read(source), tokenizer, OPTIONS, keep=keep, num_examples=2).rendered
                     for keep in (False, True))  # fmt: skip
    assert first[0] == "<system> w1 </s> <user> w2 w3 </s> <assistant>" == second[0]  # it has no answer
    talk = "<user> w11 </s> <assistant> " + "w4 " * 11 + "</s> <user> w5 w6 </s> <assistant> w7 </s>"
    assert second[1].split() == talk.split() and talk.startswith(first[1])
    plain = Survey.of(Collection.read(source), tokenizer, replace(OPTIONS, chat_template="none"), num_examples=1)
    assert plain.rendered == ["w1 w2 w3"]


def test_special_tokens_of_kept_answers_are_counted(tokenizer, tmp_path):
    """With a template and without; where answers are not kept, theirs do not matter."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "w1", "response": "w2 </s> w3"}\n{"prompt": "w4", "response": "w5"}\n')
    for options in (OPTIONS, replace(OPTIONS, chat_template="none")):
        kept = Survey.of(Collection.read(str(path), keep=True), tokenizer, options, keep=True)
        assert (kept.special, kept.special_answers) == ({}, {"</s>": 1})
        (said,) = kept.warnings
        assert said.startswith("1 of 2 answers hold special tokens in their text")
    assert not Survey.of(Collection.read(str(path)), tokenizer, OPTIONS).warnings


def test_the_verb_tells_of_tokens_in_answers_and_of_empty_splits(data, tmp_path, source):
    """A few prompts, nearly all of them equal, are too few for three splits; the reason is told."""
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "w1", "response": "w2 </s>"}\n' * 60)
    found = data(str(path), "--answers", "keep")
    assert "tokens in answers" in found.stdout and "would be empty" not in found.stdout
    (tmp_path / "rows.jsonl").write_bytes(path.read_bytes())
    found = data("--answers", "keep")
    told = "would be empty (prompts left after cleaning: 1, 59 were duplicates of others): give more prompts"
    assert found.exit_code == 0 and told in found.stdout


def test_prompts_that_are_all_too_long_leave_splits_empty(data):
    """As the fit would say, only before it; a talk ends with its first turn that is too long."""
    found = data("--max-prompt-tokens", "1")
    assert found.exit_code == 0 and "the fit, calibration and held_out splits would be empty" in found.stdout
    assert "were too long): raise max_prompt_tokens, give more prompts" in found.stdout
    some = json.loads(data("--json", "--answers", "keep", "--max-prompt-tokens", "30").stdout)
    every = json.loads(data("--json", "--answers", "keep").stdout)
    assert sum(some["splits"].values()) == sum(every["splits"].values()) - some["too_long"] > 0


def test_a_text_that_is_kept_is_never_too_long(tokenizer, tmp_path):
    """It follows its own first token; as a prompt it would be."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "w1 " * 60}) + "\n")
    kept, asked = (
        Survey.of(Collection.read(str(path), keep=keep), tokenizer, OPTIONS, keep=keep) for keep in (True, False)
    )
    assert (kept.too_long, sum(kept.splits.values())) == (0, 1)
    assert (asked.too_long, sum(asked.splits.values())) == (1, 0)


def test_a_recipe_says_how_to_look(data, tmp_path, source):
    """Its prompts, base, lengths and fractions; what is given beside it wins."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model_name_or_path: {tmp_path}/base\nprompts: [{source}]\nexit_layers: [1]\noutput_dir: out\n"
        "calibration_fraction: 0.5\nmax_prompt_tokens: 40\nanswers: keep\nprompt_limit: 21\n"
    )
    run = CliRunner().invoke
    whole = json.loads(run(app, ["data", "--config", str(recipe), "--json"]).stdout)
    assert (whole["rows"], whole["too_long"], whole["skipped"]) == (21, 1, {"no answer in it": 1})
    given = json.loads(run(app, ["data", "--config", str(recipe), "--json", "--max-prompt-tokens", "90"]).stdout)
    assert given["too_long"] == 0 and sum(given["splits"].values()) == sum(whole["splits"].values()) + 1
    most = json.loads(data("--json", "--calibration-fraction", "0.5", "--answers", "keep", "--limit", "21").stdout)
    assert most["splits"] == given["splits"]
    less = json.loads(data("--json", "--answers", "keep", "--limit", "21").stdout)
    assert less["splits"]["calibration"] < whole["splits"]["calibration"]
    alone = run(app, ["data", "--model", str(tmp_path / "base")])
    assert alone.exit_code == 1 and "no prompts: give a file, or a recipe with --config" in alone.stderr
    bare = run(app, ["data", source])
    assert bare.exit_code == 1 and "no base: give --model, or a recipe with --config" in bare.stderr
