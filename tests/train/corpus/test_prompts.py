"""Prompts: every row form, every broken file, hashes, splits and the filter against evaluation texts."""

import json
import logging
from pathlib import Path

import pytest

from runtime.errors import DataError
from runtime.text.prompts import Message, Prompt, prompt_hash, read_prompts
from tests.helpers.paths import ROOT
from train.corpus.prompts import SPLITS, assign_split, deduplicate, hash_fraction, ngram_filter

DATA = ROOT / ".." / "shared" / "data"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text: str, *later: str) -> Prompt:
    return Prompt((Message("user", text),), later)


def test_reads_every_row_form(tmp_path):
    conversation = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "dropped"},
    ]
    source = write(
        tmp_path / "p.jsonl",
        {"prompt": "one", "turns": None},
        {"turns": ["two", "three"]},
        {"messages": conversation},
        {"instruction": "do", "input": "this"},
        {"instruction": "do", "input": ""},
    )
    kept = tuple(Message(entry["role"], entry["content"]) for entry in conversation[:-1])
    assert read_prompts(source) == [
        user("one"),
        user("two", "three"),
        Prompt(kept),
        user("do\n\nthis"),
        user("do"),
    ]
    assert read_prompts(source, limit=2) == [user("one"), user("two", "three")]


def test_reads_a_json_list(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1), encoding="utf-8")
    assert read_prompts(str(path)) == [user("a"), user("b")]


def test_tolerates_mark_crlf_blank_lines_and_line_separators(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c"}')
    assert read_prompts(str(path)) == [user("a"), user("b\u2028c")]


def test_replaces_what_tokenizers_refuse(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine \\ud83d\\ude00"}\n{"prompt": "x\\u0000y\\ud800"}\n', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert read_prompts(str(path)) == [user("fine \U0001f600"), user("x\ufffdy\ufffd")]
    assert len(caplog.records) == 1 and "line 2" in caplog.text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ('["a"]', "got list"),
        ('"a"', "got str"),
        ('{"text": "a"}', "found text"),
        ("{}", "found no field"),
        ('{"prompt": 3}', "expected `prompt` to be text"),
        ('{"prompt": "  "}', "text that is not empty"),
        ('{"turns": []}', "expected `turns` to be a list"),
        ('{"turns": "a"}', "expected `turns` to be a list"),
        ('{"turns": ["a", {"text": "b"}]}', "`turns[1]`"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "role `user`"),
        (
            '{"messages": [{"role": "robot", "content": "a"}, {"role": "user", "content": "b"}]}',
            "`messages[0]`",
        ),
        ('{"messages": [{"role": "user"}]}', "`messages[0].content`"),
        ("[" * 100_000, "not usable JSON"),
    ],
)
def test_a_broken_row_names_file_line_and_field(tmp_path, line, expected):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_prompts(str(path))
    message = str(caught.value)
    assert f"{path}, line 3" in message and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", b"", "no prompts in it"),
        ("p.jsonl", b"\n \r\n", "no prompts in it"),
        ("p.json", b"", "no prompts in it"),
        ("p.json", b"[]", "no prompts in it"),
        ("p.json", b'{"prompt": "a"}', "expected a list of rows, got dict"),
        ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}', "not valid JSON"),
        ("p.json", b'[{"prompt": "a"}, 3]', "row 2"),
        ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
        ("p.txt", b"a", "expected a .jsonl or .json file"),
    ],
)
def test_a_broken_file_is_one_line_of_error(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(str(path))
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read"):
        read_prompts(str(tmp_path / "absent.jsonl"))


def test_hash_tells_prompts_apart():
    prompts = [
        user("a"),
        user("b"),
        user("a", "b"),
        user("ab"),
        Prompt((Message("system", "a"),)),
        Prompt((Message("user", "a"), Message("user", "b"))),
    ]
    assert len({prompt.hash for prompt in prompts}) == len(prompts)
    assert prompts[0].hash == prompt_hash([Message("user", "a")])
    # The hash decides the split: were it to change, held-out prompts would move into the fit split.
    assert prompts[0].hash == "4c22745893d2ab6638f9cd31d664c0f2e38bc1a342e855f6b4c04cfca3a13a8e"


def test_splits_follow_their_fractions_and_are_stable():
    digests = [user(str(number)).hash for number in range(20_000)]
    fractions = {"calibration_fraction": 0.1, "held_out_fraction": 0.2}
    splits = [assign_split(digest, **fractions) for digest in digests]
    shares = [splits.count(split) / len(splits) for split in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert splits == [assign_split(digest, **fractions) for digest in digests]
    assert {assign_split(d, calibration_fraction=0, held_out_fraction=0) for d in digests} == {"fit"}
    assert hash_fraction("f" * 64) < 1 and hash_fraction("0" * 64) == 0


def test_duplicates_are_dropped_and_counted():
    assert deduplicate([user("a"), user("b"), user("a"), user("a", "b"), user("a")]) == (
        [user("a"), user("b"), user("a", "b")],
        2,
    )


def test_filter_drops_prompts_that_share_a_run_of_words(tmp_path):
    words = [f"w{number}" for number in range(30)]
    evaluation = write(tmp_path / "e.jsonl", {"turns": ["short question?", " ".join(words)]})
    exactly = user("x " + ", ".join(words[5:18]).upper() + " y")
    one_less = user("x " + " ".join(words[5:17]) + " y")
    later = user("fine", "again " + " ".join(words[0:13]))
    same_short, holds_short = user("Short question"), user("is this a short question?")
    no_words = user("?!")
    prompts = [exactly, one_less, later, same_short, holds_short, no_words]
    kept, dropped = ngram_filter(prompts, evaluation_files=[evaluation])
    assert kept == [one_less, holds_short, no_words]
    assert dropped == [exactly, later, same_short]
    assert ngram_filter(prompts, evaluation_files=[]) == (prompts, [])
    assert one_less in ngram_filter(prompts, evaluation_files=[evaluation], n=12)[1]


@pytest.mark.skipif(not DATA.exists(), reason="the shared prompt data is not here")
def test_real_files_read_and_filter():
    bench = str(DATA / "bench" / "spec_bench" / "question.jsonl")
    questions = read_prompts(bench)
    assert len(questions) == 480 and sum(len(prompt.later_turns) for prompt in questions) == 80
    assert len(read_prompts(str(DATA / "train" / "gpteacher" / "codegen-instruct.json"))) == 4535
    assert ngram_filter(questions, evaluation_files=[bench])[0] == []
