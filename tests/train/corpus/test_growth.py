"""A corpus whose prompts change: what is kept, what is answered, what is the same as if it were made at once."""

import dataclasses

import pytest

from runtime.errors import ConfigError
from tests.helpers.corpora import OPTIONS, TURNS_2, prompts, record, rows, run
from train.corpus.answers import Answerer
from train.corpus.growth import EARLIER


@pytest.fixture
def asked(monkeypatch):
    """Hashes of the prompts whose turns were answered, in lists of one a batch."""
    seen = []
    answer = Answerer.answer

    def spy(self, batch, **given):
        seen.extend(turn.prompt.hash for turn in batch)
        return answer(self, batch, **given)

    monkeypatch.setattr(Answerer, "answer", spy)
    return seen


def test_prompts_that_are_added_are_answered_alone(model, tokenizer, tmp_path, asked):
    """Others keep their rows; splits and counts are those of all prompts, and the next run finds it complete."""
    options = dataclasses.replace(OPTIONS, batch_size=1)  # no padding: answers are the same in any company
    whole = run(model, tokenizer, prompts(18), tmp_path / "whole", options)
    folder = run(model, tokenizer, prompts(9), tmp_path / "c", options)
    asked.clear()
    run(model, tokenizer, prompts(18), folder, options)
    new = {prompt.hash for prompt in prompts(18)[9:]}
    assert set(asked) == new and len(asked) == 9
    assert rows(folder) == rows(whole)
    assert record(folder) == record(whole)
    assert not (folder / EARLIER).exists()
    asked.clear()
    run(model, tokenizer, prompts(18), folder, options)
    assert not asked


def test_prompts_that_are_taken_away_leave_with_their_rows(model, tokenizer, tmp_path, asked):
    """Nothing is answered."""
    folder = run(model, tokenizer, prompts(18), tmp_path / "c")
    asked.clear()
    run(model, tokenizer, prompts(12), folder)
    left = {prompt.hash for prompt in prompts(12)}
    assert not asked and {row["prompt_hash"] for row in rows(folder)} == left
    assert sum(record(folder)["counts"]["rows"].values()) == 12


def test_a_growth_that_was_killed_goes_on(model, tokenizer, tmp_path, asked, monkeypatch):
    """Rows of before and finished batches are there when it is run again; other prompts are refused until then."""
    folder = run(model, tokenizer, [*prompts(9), *TURNS_2], tmp_path / "c")
    grown = [*prompts(18), *TURNS_2]
    spy, asked[:] = Answerer.answer, []

    def killed(self, batch, **given):
        if len(asked) >= 4:
            raise KeyboardInterrupt
        return spy(self, batch, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, grown, folder)
    assert not record(folder)["complete"] and (folder / EARLIER).exists()
    with pytest.raises(ConfigError, match=r"settings: prompts \("):
        run(model, tokenizer, prompts(12), folder)
    run(model, tokenizer, grown, folder)
    assert len(asked) == len(set(asked)) == 9
    turns = {prompt.hash: 1 + len(prompt.later_turns) for prompt in grown}
    assert record(folder)["complete"] and len(rows(folder)) == sum(turns.values())
