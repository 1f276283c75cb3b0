"""Data as teams have it: every form and file, what is skipped and why, shares of several sources."""

import gzip
import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.adapter.hub import WAITS
from runtime.errors import ConfigError, DataError
from runtime.text.prompts import Message, Prompt
from train.corpus.collection import Collection
from train.corpus.conversation import Conversation
from train.settings.source import Source

SHAREGPT = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
CHAT = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
TALK = Conversation(Prompt((Message("system", "s"), Message("user", "a")), ("c",)), ("b", "d"))


def sharegpt(turns=SHAREGPT):
    return [{"from": role, "value": text} for role, text in turns]


def chat(turns=CHAT):
    return [{"role": role, "content": text} for role, text in turns]


def one(row, **source) -> Conversation:
    return Conversation.of(row, Source("x", **source))


def asked(text, *answers, **others) -> Conversation:
    return Conversation(Prompt((Message("user", text),)), answers, **others)


def test_forms_of_conversations_mean_the_same():
    """ShareGPT, chats, lists as JSON in a cell, objects of lists, and a system's message in a column of its own."""
    rows = [{"conversations": sharegpt()}, {"messages": chat()}, {"conversations": json.dumps(sharegpt())}]
    rows += [{"messages": {"role": [role for role, _ in CHAT], "content": [text for _, text in CHAT]}}]
    rows += [{"system_prompt": "s", "conversations": sharegpt(SHAREGPT[1:])}]
    rows += [{"prompt": chat(CHAT[:-1]), "completion": chat(CHAT[-1:])}]
    rows += [{"conversations": sharegpt(SHAREGPT[:-1]), "chosen": sharegpt(SHAREGPT[-1:])[0]}]
    rows += [{"messages": chat(), "completion": chat(CHAT[2:3])}]  # it has its answer
    rows += [{"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in CHAT]}]
    assert [one(row) for row in rows] == [TALK] * len(rows)


def test_forms_of_pairs_and_texts():
    assert one({"prompt": "a", "response": "b"}) == one({"question": "a", "answer": "b"}) == asked("a", "b")
    assert one({"instruction": "a", "input": "x", "output": "b"}) == asked("a\n\nx", "b")
    assert one({"prompt": "a", "chosen": chat([("user", "a"), ("assistant", "b")])}) == asked("a", "b")
    assert one({"text": "a"}) == asked("a", whole=True)
    assert one({"turns": ["a", "c"], "category": "qa"}).prompt.task == "qa"
    assert one({"q1": "a", "a1": "b", "prompt": "no"}, column="q1", answer="a1") == asked("a", "b")


def test_conversations_that_do_not_alternate():
    """A leading answer goes, an open question stays, tools keep all that was said as the prompt."""
    assert one({"conversations": sharegpt([("gpt", "x"), *SHAREGPT[1:]])}).prompt.messages == (Message("user", "a"),)
    assert one({"conversations": sharegpt(SHAREGPT[:-1])}).answers == ("b",)
    tools = [("user", "a"), ("assistant", "b"), ("tool", "t"), ("user", "c"), ("assistant", "d")]
    found = one({"messages": chat(tools)})
    assert [message.content for message in found.prompt.messages] == ["a", "b", "t", "c"]
    assert (found.prompt.later_turns, found.answers) == ((), ("d",))


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(text)
    return str(path)


def test_every_kind_of_file(tmp_path):
    rows = [{"conversations": sharegpt()}] * 2
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "lines.json"):
        assert Collection.read(write(tmp_path / name, rows)).conversations == [TALK] * 2, name
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "t.csv").write_text('question,answer\nNA,1\n"what,\nis",2\n')
    (tmp_path / "t.tsv").write_text("prompt\tx\na\t3\n")
    (tmp_path / "l.txt").write_text("one\ntwo\n")
    assert Collection.read(str(tmp_path / "list.json?limit=1")).conversations == [TALK]
    assert Collection.read(str(tmp_path / "t.csv")).conversations == [asked("NA", "1"), asked("what,\nis", "2")]
    assert Collection.read(str(tmp_path / "t.tsv")).conversations == [asked("a")]
    assert [prompt.texts for prompt in Collection.read(str(tmp_path / "l.txt")).prompts] == [("one",), ("two",)]
    assert len(Collection.read(str(tmp_path / "a.*")).conversations) == 6


def test_what_cannot_be_understood_is_skipped_and_counted(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    lines = ['{"prompt": "fine"}', '{"prompt": "a"', '["a"]', "{}", '{"prompt": 3}', '{"prompt": "  "}', ""]
    lines += [
        '{"messages": [{"role": "robot", "content": "a"}]}',
        '{"messages": [{"role": "system", "content": "a"}]}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b'\n{"prompt": "b\xe2\x80\xa8c\\u0000"}')
    with caplog.at_level(logging.WARNING):
        found = Collection.read(str(path))
    assert found.prompts == [asked("fine").prompt, asked("b\u2028c\ufffd").prompt]
    assert len(caplog.records) == 1 and "7 of 9 rows skipped" in caplog.text
    assert found.skipped == {
        "not valid JSON": 1, "expected an object, got list": 1, "no prompt in it": 1, "expected text, got int": 1,
        "a text that is empty": 1, "a message of the unknown role 'robot'": 1, "no message of a user": 1,
    }  # fmt: skip
    assert found.first["not valid JSON"] == "line 2"


@pytest.mark.parametrize(
    ("name", "content", "keep", "expected"),
    [
        ("a.csv", b"colour,size\nred,3\n", False, "found the columns colour, size; expected one of the columns conv"),
        ("a.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), False, "save it as UTF-8"),
        ("a.jsonl", b"", False, "it is empty"),
        ("a.json", b"[1, 2]", False, "2 of 2 rows skipped: 2 expected an object, got int (the first: row 1)"),
        ("a.json", b"[{]", False, "not valid JSON; expected one list of rows"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), False, "not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "a"}', True, "FILE?answer=NAME"),
        ("a.jsonl.gz", b"no gzip", False, "cannot be read"),
        ("a.parquet", b"no parquet", False, "cannot be read as parquet"),
        ("a.docx", b"a", False, "ends in .jsonl"),
        (
            "a.csv",
            b"prompt;answer\na;b\n",
            False,
            "has semicolons and no commas, so it is one name, 'prompt;answer': sa",
        ),
        ("a.csv", b"prompt\tanswer\na\tb\n", False, "has tabs and no commas"),
        ("a.tsv", b"prompt,answer\na,b\n", False, "has commas and no tabs"),
        (
            "a.csv",
            b"prompt\na,b\n",
            False,
            "1 more cells than the 1 columns; put those with a separator in quotes (the f",
        ),
        ("prompts", b"{}", False, "name it so if it is one, or convert it"),
    ],
)
def test_where_nothing_is_left_one_line_says_what_was_found(tmp_path, name, content, keep, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Collection.read(str(tmp_path / name), keep=keep)
    assert expected in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_surplus_cells_of_a_table_are_told_by_line(tmp_path, caplog):
    """Before, they were dropped with what they held. Empty ones mean nothing; a cell that lacks is none."""
    path = tmp_path / "A.CSV"
    path.write_text('prompt,answer\nfine,b,,\n\n"two\nlines",b\n"Hello\n\n", you,b\nshort\n')
    found = Collection.read(str(path))
    assert found.conversations == [asked("fine", "b"), asked("two\nlines", "b"), asked("short")]
    assert "1 of 4 rows skipped: 1 more cells than the 2 columns; put" in caplog.text
    assert list(found.first.values()) == ["line 6"]  # where it begins


def test_what_takes_long_says_so(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}] * 3)
    Collection.read(path)
    assert not capsys.readouterr().err  # it was quick
    monkeypatch.setattr("train.corpus.collection.SILENT", 0)
    Collection.read(path)
    assert f"read {path}: " in capsys.readouterr().err


def test_sources_keep_their_shares(tmp_path):
    """As many as there can be, evenly spaced; one without a weight is taken whole."""
    for name, number in (("a", 100), ("b", 30), ("c", 7)):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{index}"} for index in range(number)])
    texts = [f"{tmp_path}/{name}.jsonl{query}" for name, query in (("a", "?weight=2"), ("b", "?weight=1"), ("c", ""))]
    found = [prompt.texts[0] for prompt in Collection.mix(texts).prompts]
    assert [sum(text[0] == name for text in found) for name in "abc"] == [60, 30, 7]
    assert found[0] == "a0" and found[59] == "a98" and len(set(found)) == 97


def test_answers_are_needed_only_to_be_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": chat()}, {"prompt": "x"}, {"messages": chat(CHAT[:-1])}])
    assert len(Collection.read(path).conversations) == 3
    kept = Collection.read(path, keep=True)
    assert kept.skipped == {"no answer in it": 1}
    assert [(one.prompt.later_turns, one.answers) for one in kept.conversations] == [
        (("c",), ("b", "d")),
        ((), ("b",)),
    ]


def test_sources_are_parsed(tmp_path):
    assert Source.parse("org/set:test[:5%]?subset=main&streaming=true&limit=5") == Source(
        "org/set", split="test[:5%]", subset="main", streaming=True, limit=5
    )
    odd = tmp_path / "what?limit=3"
    odd.touch()
    assert Source.parse(str(odd)) == Source(str(odd))
    for text, expected in (
        ("a.csv?colum=x", "did you mean column"),
        ("a.csv?limit=many", "limit: expected int"),
        ("a.csv?weight=-1", "weight: expected a number above 0"),
        ("a/b?streaming=true", "expected a limit with streaming"),
        ("?limit=3", "expected a file or a name"),
    ):
        with pytest.raises(ConfigError, match=expected):
            Source.parse(text)


def test_a_data_set_is_loaded_by_name_and_split(monkeypatch):
    given = []

    def load_dataset(*names, **options):
        given.append((*names, options))
        return datasets.Dataset.from_list([{"prompt": "a", "turns": None}, {"prompt": None, "turns": ["b", "c"]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = Collection.read("some/set:test?subset=main&streaming=true&limit=9").prompts
    assert found == Collection.read("some/set").prompts == [asked("a").prompt, one({"turns": ["b", "c"]}).prompt]
    assert given == [
        ("some/set", "main", {"split": "test", "streaming": True}),
        ("some/set", None, {"split": "train", "streaming": False}),
    ]


def test_a_data_set_that_fails_to_load_is_one_line_of_error(monkeypatch):
    def load_dataset(*names, **options):
        raise ValueError("Unknown split\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'test' of data set 'some/set'.*Unknown split") as caught:
        Collection.read("some/set:test")
    assert "\n" not in str(caught.value)


def test_a_data_set_is_asked_for_again_where_the_connection_drops(hub, monkeypatch):
    """What is there at last is said in one line; the Hub of the tests holds no data sets."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.faults = {1: "drop", 2: "drop"}  # the library may ask first for something that it can do without
    with pytest.raises(DataError, match="of data set 'some-org/set' could not be loaded") as caught:
        Collection.read("some-org/set")
    assert "\n" not in str(caught.value)
    assert WAITS[0] in hub.slept
