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
    survey = Survey.of(read, tokenizer, OPTIONS)
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
    assert sum(survey.splits.values()) == len(survey.prompts)


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
    for part in ("no answer in it", "1 prompts above", "</s> in 1", "assistant: w4", "19 with 2", "median"):
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
