"""Answers that exist: as the template writes them, turn by turn, without generating; how far they are the base's."""

import logging
from dataclasses import replace

import pytest

from runtime.text.prompts import Message, Prompt
from tests.helpers.corpora import EOS, OPTIONS, prompts, record, rows, run
from train.corpus.collection import Collection
from train.corpus.conversation import Conversation

TALKS = [
    Conversation(Prompt((Message("user", f"w{n} w{n + 1}"),), ("w9 w8",) * (n % 2)), ("w7 w6", "w5")[: 1 + n % 2])
    for n in range(20)
]


def keep(model, tokenizer, talks, folder, options=OPTIONS):
    return run(model, tokenizer, [talk.prompt for talk in talks], folder, options, given=talks)


@pytest.fixture
def silent(model, monkeypatch):
    """A base that must not generate."""
    monkeypatch.setattr(type(model), "generate", lambda *given, **options: pytest.fail("it generates"))
    return model


def test_rows_are_what_the_template_makes_of_the_conversation(silent, tokenizer, tmp_path):
    found = {(row["prompt_hash"], row["wave"]): row for row in rows(keep(silent, tokenizer, TALKS, tmp_path / "c"))}
    assert len(found) == 30 and not any(row["sampled"] for row in found.values())
    for talk in TALKS:
        chat = [{"role": "user", "content": talk.prompt.texts[0]}]
        for wave, answer in enumerate(talk.answers):
            asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            chat.append({"role": "assistant", "content": answer})
            whole = tokenizer.apply_chat_template(chat, return_dict=False)
            row = found[talk.prompt.hash, wave]
            assert row["prompt_ids"] == asked and row["prompt_ids"] + row["response_ids"] == whole
            assert row["response_ids"][-1] == EOS
            chat.append({"role": "user", "content": "w9 w8"})


def test_a_long_answer_is_cut_but_whole_in_the_next_prompt(silent, tokenizer, tmp_path):
    talk = Conversation(Prompt((Message("user", "w1"),), ("w2",)), ("w7 " * 9, "w5"))
    first, second = rows(keep(silent, tokenizer, [talk], tmp_path / "c"))
    assert len(first["response_ids"]) == OPTIONS.max_new_tokens and EOS not in first["response_ids"]
    assert tokenizer.decode(second["prompt_ids"]).count("w7") == 9


def test_a_template_that_writes_the_prompt_otherwise(silent, tokenizer, tmp_path):
    """Then the answer by itself, with the end of a turn."""
    tokenizer.chat_template = tokenizer.chat_template.replace("<assistant>{%", "<assistant> w99{%")
    found = rows(keep(silent, tokenizer, TALKS[:1], tmp_path / "c"))
    assert [row["response_ids"] for row in found] == [[*tokenizer("w7 w6")["input_ids"], EOS]]


def test_a_text_without_roles_follows_its_first_token(silent, tokenizer, tmp_path):
    talk = Conversation(Prompt((Message("user", "w1 w2 w3"),)), whole=True)
    (row,) = rows(keep(silent, tokenizer, [talk], tmp_path / "c"))
    assert row["prompt_ids"] + row["response_ids"] == tokenizer("w1 w2 w3")["input_ids"]
    assert len(row["prompt_ids"]) == 1


def test_the_share_that_the_base_would_choose_is_told(model, tokenizer, tmp_path, caplog):
    """Foreign answers get a warning; the base's own, generated before, none, and nearly all are its choice."""
    caplog.set_level(logging.INFO)
    foreign = record(keep(model, tokenizer, TALKS, tmp_path / "foreign"))["counts"]["greedy_agreement"]
    assert foreign < 0.5 and [one.levelname for one in caplog.records] == ["WARNING"]
    assert "answers: distil" in caplog.text
    asked = prompts(12)
    own = {row["prompt_hash"]: row["response_ids"] for row in rows(run(model, tokenizer, asked, tmp_path / "own"))}
    talks = [Conversation(prompt, (tokenizer.decode([i for i in own[prompt.hash] if i != EOS]),)) for prompt in asked]
    talks = [talk for talk in talks if talk.answers[0].strip()]
    caplog.clear()
    counts = record(keep(model, tokenizer, talks, tmp_path / "kept"))["counts"]
    assert counts["greedy_agreement"] > 0.8
    assert "WARNING" not in [one.levelname for one in caplog.records]
    assert "greedy_agreement" not in record(tmp_path / "own")["counts"]


def test_special_tokens_in_kept_answers_are_told(model, tokenizer, tmp_path, caplog):
    """They end what is learnt of an answer; counted over all turns, with a template and without."""
    cut = Conversation(Prompt((Message("user", "w1"),), ("w2",)), ("w3 w4", "w5 </s> w6 w7"))
    folder = keep(model, tokenizer, [*TALKS, cut], tmp_path / "c")
    last = max((row for row in rows(folder) if row["prompt_hash"] == cut.prompt.hash), key=lambda row: row["wave"])
    assert tokenizer.decode(last["response_ids"]) == "w5 </s>"
    (said,) = [text for text in caplog.messages if "special tokens" in text]
    assert said.startswith("1 of 32 answers hold special tokens in their text") and "\n" not in said
    assert "learnt up to its first end of a turn alone: </s> in the one that begins 'w5 </s> w6 w7'" in said
    caplog.clear()
    keep(model, tokenizer, [*TALKS, cut], tmp_path / "d", replace(OPTIONS, chat_template="none"))
    assert [text for text in caplog.messages if text.startswith("1 of 32 answers hold special tokens")]
    caplog.clear()
    keep(model, tokenizer, TALKS, tmp_path / "e")
    assert not [text for text in caplog.messages if "special tokens" in text]


def test_kept_and_distilled_are_different_corpora(model, tokenizer, tmp_path):
    """The folder of one is refused to the other, and to other answers; complete, it is taken as it is."""
    keep(model, tokenizer, TALKS, tmp_path / "c")
    keep(model, tokenizer, TALKS, tmp_path / "c")
    for talks in ([replace(talk, answers=("w3",) * len(talk.answers)) for talk in TALKS], None):
        with pytest.raises(ValueError, match="other settings: answers"):
            run(model, tokenizer, [talk.prompt for talk in TALKS], tmp_path / "c", given=talks)


def test_what_was_skipped_is_in_the_record(model, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "w1"}\n{"prompt": ""}\n')
    read = Collection.read(str(tmp_path / "a.jsonl"))
    folder = run(model, tokenizer, read.prompts, tmp_path / "c", skipped=read.skipped)
    assert record(folder)["counts"]["skipped"] == {"no prompt in it": 1}
