"""Shards of a corpus: kill and resume, torn and foreign ones, and work that processes share."""

import dataclasses
import logging
import shutil
import threading

import pytest
import torch
from tqdm import tqdm

from runtime.errors import ConfigError, DataError
from tests.helpers.corpora import OPTIONS, TEMPLATE, TURNS_2, files, prompts, run
from train.corpus.answers import Answerer
from train.corpus.corpus import distil, load_split


@pytest.mark.parametrize("stop_after", [0, 1, 4, 6])
@pytest.mark.parametrize("sample_fraction", [0.0, 0.5])
def test_a_killed_run_goes_on_and_gives_the_same(model, tokenizer, tmp_path, monkeypatch, stop_after, sample_fraction):
    """Whatever was finished is kept, and the files equal those of a run that was not killed."""
    options = dataclasses.replace(OPTIONS, sample_fraction=sample_fraction, temperature=1.3, top_p=0.9)
    whole = run(model, tokenizer, TURNS_2, tmp_path / "whole", options)
    num_batches = len(list((whole / "shards").iterdir()))
    plain, calls = Answerer.answer, []

    def answer(self, batch, *, name, told):
        """Answer until it is time to be killed."""
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(name)
        return plain(self, batch, name=name)

    monkeypatch.setattr(Answerer, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, TURNS_2, tmp_path / "c", options)
    with pytest.raises(DataError, match=r"is not complete; run train/distil.py"):
        load_split(tmp_path / "c", "fit")
    finished = set(calls)
    assert len(finished) == stop_after
    calls.clear()
    torch.manual_seed(99)  # the state of the random numbers must not matter
    stop_after = -1
    resumed = run(model, tokenizer, TURNS_2, tmp_path / "c", options)
    assert not finished & set(calls) and len(finished) + len(calls) == num_batches
    assert files(resumed) == files(whole)


def test_a_torn_shard_is_made_again(model, tokenizer, tmp_path, monkeypatch, caplog):
    """Cut, empty or exchanged ones, with a warning that names each."""
    folder = run(model, tokenizer, prompts(18), tmp_path / "c")
    before = files(folder)
    shards = sorted((folder / "shards").iterdir())
    shards[1].write_bytes(shards[1].read_bytes()[:-40])
    shards[2].write_bytes(b"")
    shards[3].write_bytes(shards[0].read_bytes())
    (folder / "corpus.json").unlink()
    with caplog.at_level(logging.WARNING):
        run(model, tokenizer, prompts(18), folder)
    assert files(folder) == before
    assert [shard.name for shard in shards[1:4] if shard.name in caplog.text] == [s.name for s in shards[1:4]]


def test_shards_of_other_settings_are_not_taken(model, tokenizer, tmp_path):
    """Those of another model are made again."""
    folder = run(model, tokenizer, prompts(18), tmp_path / "c", fingerprint="one")
    (folder / "corpus.json").unlink()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    run(model, tokenizer, prompts(18), folder, fingerprint="two")
    fresh = run(model, tokenizer, prompts(18), tmp_path / "d", fingerprint="two")
    assert files(folder) == files(fresh)


def test_a_complete_corpus_is_returned_at_once(model, tokenizer, tmp_path, monkeypatch):
    """Without the model; a lost split comes back from the shards."""
    folder = run(model, tokenizer, prompts(9), tmp_path / "c")
    before = files(folder)
    monkeypatch.setattr(model, "generate", None)
    assert run(model, tokenizer, prompts(9), tmp_path / "c") == folder
    (folder / "fit.parquet").unlink()
    with pytest.raises(DataError, match=r"fit.parquet cannot be read"):
        load_split(folder, "fit")
    run(model, tokenizer, prompts(9), tmp_path / "c")  # from the shards, without a model
    assert files(folder) == before


def test_other_settings_are_refused_by_name(model, tokenizer, tmp_path):
    """The error names what differs, there and now."""
    folder = run(model, tokenizer, prompts(9), tmp_path / "c", fingerprint="one")
    other = dataclasses.replace(OPTIONS, max_new_tokens=7, top_p=0.5)
    with pytest.raises(ConfigError, match=r"settings: max_new_tokens \(6 there, 7 now\), top_p \(1.0 there") as caught:
        run(model, tokenizer, prompts(9), folder, other, fingerprint="one")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"settings: model \("):
        run(model, tokenizer, prompts(9), folder, fingerprint="two")
    tokenizer.chat_template = TEMPLATE + " "
    with pytest.raises(ConfigError, match=r"settings: tokenizer \("):
        run(model, tokenizer, prompts(9), folder, fingerprint="one")


def test_two_processes_give_what_one_gives(model, tokenizer, tmp_path):
    """Rank 1 makes its shards, rank 0 the rest and the corpus."""
    options = dataclasses.replace(OPTIONS, sample_fraction=0.5)
    one = run(model, tokenizer, prompts(18), tmp_path / "one", options)
    for rank in (1, 0):
        two = run(model, tokenizer, prompts(18), tmp_path / "two", options, rank=rank, world_size=2)
        assert (two / "corpus.json").exists() == (rank == 0)
        assert len(list((two / "shards").iterdir())) == (2 if rank == 1 else 5)
    assert files(one) == files(two)


def as_two(model, tokenizer, asked, folder, barrier, **others):
    """The corpus of two threads with a real barrier; greedy, as threads share the random numbers."""
    results, failures = {}, []

    def work(rank: int) -> None:
        """The part of one rank."""
        try:
            team = {"rank": rank, "world_size": 2, "barrier": barrier.wait}
            results[rank] = run(model, tokenizer, asked, folder, **team, **others)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and results[0] == results[1]
    return results[0]


def test_two_processes_wait_for_each_other_between_waves(model, tokenizer, tmp_path):
    """A second turn needs the first answers of both."""
    one = run(model, tokenizer, TURNS_2, tmp_path / "one")
    two = as_two(model, tokenizer, TURNS_2, tmp_path / "two", threading.Barrier(2, timeout=60))
    assert files(one) == files(two)


def test_processes_that_share_a_base_answer_equally_often(model, tokenizer, tmp_path, monkeypatch):
    """Also where only one of them has something to do."""
    one = run(model, tokenizer, TURNS_2, tmp_path / "one")
    shards = tmp_path / "two" / "shards"
    shutil.copytree(one / "shards", shards)
    for name in ("wave-0-batch-00000", "wave-0-batch-00003", "wave-1-batch-00001"):
        (shards / f"{name}.parquet").unlink()
    meeting, answered = threading.Barrier(2, timeout=60), []
    generate = Answerer.answer

    def together(self, batch, *, name, told):
        """Answer once both are there."""
        meeting.wait()  # as the layers of a base that is spread would
        self.together = False  # but there is no group of processes here
        found = generate(self, batch, name=name)
        self.together = True
        answered.append(name)
        meeting.wait()
        return found

    monkeypatch.setattr(Answerer, "answer", together)
    two = as_two(model, tokenizer, TURNS_2, tmp_path / "two", threading.Barrier(2, timeout=60), together=True)
    assert files(one) == files(two)
    assert len(answered) == 6


def test_a_shard_missing_after_its_wave_is_an_error(model, tokenizer, tmp_path):
    """Rank 0 alone cannot finish the work of two."""
    with pytest.raises(DataError, match=r"batch-00001.parquet is not there"):
        run(model, tokenizer, prompts(18), tmp_path / "c", rank=0, world_size=2)


def test_progress_is_shown_on_rank_0_alone(model, tokenizer, tmp_path, capsys):
    """The bar with waves and tokens a second."""
    distil(model, tokenizer, prompts(9), tmp_path / "a", OPTIONS, rank=1, world_size=2)
    assert "batch" not in capsys.readouterr().err
    distil(model, tokenizer, prompts(9), tmp_path / "a", OPTIONS, rank=0, world_size=2)
    shown = capsys.readouterr().err
    assert "wave 0" in shown and "tokens/s" in shown


def test_the_bar_moves_within_a_batch(model, tokenizer, tmp_path, capsys, monkeypatch):
    """Each token of a batch is told, in order, where the bar is shown; the text is the same where it is not."""
    told, update = [], tqdm.update

    def moved(bar, n=1):
        if n == 0:
            told.append(bar.postfix)
        return update(bar, n)

    monkeypatch.setattr(tqdm, "update", moved)
    monkeypatch.setattr("tqdm.std.time", lambda: 2.0 * len(told))  # a bar is drawn once a second
    options = dataclasses.replace(OPTIONS, batch_size=9, sample_fraction=0.0)
    shown = distil(model, tokenizer, prompts(9), tmp_path / "a", options)
    assert told == [f"token {number} of 6" for number in range(1, 7)]
    assert "token 3 of 6" in capsys.readouterr().err
    assert files(shown) == files(run(model, tokenizer, prompts(9), tmp_path / "b", options))
    assert len(told) == 6
