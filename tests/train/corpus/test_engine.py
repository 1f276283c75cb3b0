"""Answers made together: those of the base alone, whatever their number, and the corpora of them."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import train.corpus.engine
from runtime.errors import ConfigError
from tests.helpers.corpora import EOS, OPTIONS, TURNS_2, files, prompts, record, rows, run
from tests.helpers.families import NATIVE_SHAPE, randomise
from train.corpus.engine import EngineAnswerer

SAMPLED = dataclasses.replace(OPTIONS, sample_fraction=0.5, temperature=1.3, top_p=0.9)


@pytest.fixture
def shared(monkeypatch):
    """Requests are answered together on any machine and in any dtype, as they are where they share the weights."""
    monkeypatch.setattr(train.corpus.engine, "_may_share", lambda model: True)
    monkeypatch.setattr(train.corpus.engine, "_shares", lambda specbound, model: specbound.why_stock(model) is None)


@pytest.fixture
def native():
    """A base whose layers our kernels run, where there are any."""
    torch.manual_seed(0)
    shape = NATIVE_SHAPE | {"vocab_size": 128, "eos_token_id": EOS}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16).eval()
    randomise(made)
    with torch.no_grad():
        made.lm_head.weight[EOS] *= 2.5
    return made


def alone(model, row, options):
    """What `generate` answers to the prompt of a row."""
    ids = torch.tensor([row["prompt_ids"]])
    how = {"do_sample": False}
    if row["sampled"]:
        how = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    return model.generate(ids, max_new_tokens=6, **how)[0, ids.shape[1] :].tolist()


def test_answers_are_those_of_the_base_alone(native, tokenizer, tmp_path, shared):
    """Each prompt again, by itself; some end early and some do not."""
    found = rows(run(native, tokenizer, prompts(18), tmp_path / "c"))
    assert [row["response_ids"] for row in found] == [alone(native, row, OPTIONS) for row in found]
    assert 0 < sum(row["response_ids"][-1] == EOS for row in found) < 18
    assert not hasattr(native, "specbound")


def test_sampled_answers_have_a_seed_of_the_turn_s_own(model, tokenizer, tmp_path, shared, monkeypatch):
    """What `generate` samples after it; no two turns have the same."""
    seeds, ask = {}, EngineAnswerer._ask

    def asked(self, batch, turn):
        call = ask(self, batch, turn)
        seeds[tuple(turn.prompt_ids)] = call.waiting.seed
        return call

    monkeypatch.setattr(EngineAnswerer, "_ask", asked)
    before = torch.get_rng_state()
    found = rows(run(model, tokenizer, TURNS_2, tmp_path / "c", SAMPLED))
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(seeds.values())) == len(seeds) == len(found) and any(row["sampled"] for row in found)
    for row in found:
        torch.manual_seed(seeds[tuple(row["prompt_ids"])])
        assert row["response_ids"] == alone(model, row, SAMPLED)


def test_neither_batch_size_nor_processes_matter(model, tokenizer, tmp_path, shared):
    """The corpus is the same, byte for byte, its record too; shards are not part of it."""

    def parts(folder):
        return {name: data for name, data in files(folder).items() if "wave" not in name}

    made = []
    for size in (1, 3, 8):
        options = dataclasses.replace(SAMPLED, batch_size=size)
        made.append(parts(run(model, tokenizer, TURNS_2[::2], tmp_path / str(size), options)))
    assert len(made[0]) == 4 and made[0] == made[1] == made[2]
    one = run(model, tokenizer, prompts(9), tmp_path / "one", SAMPLED)
    for rank in (1, 0):
        two = run(model, tokenizer, prompts(9), tmp_path / "two", SAMPLED, rank=rank, world_size=2)
    assert files(one) == files(two)


def test_prompts_join_as_others_end(model, tokenizer, tmp_path, shared, monkeypatch):
    """No place is free while a prompt waits, also across batches: fewer rounds than batches one by one take."""
    counts, round_ = [], train.corpus.engine.Batch.round

    def counted(batch):
        ended = round_(batch)
        counts.append(len(batch.running) + len(ended))
        return ended

    monkeypatch.setattr(train.corpus.engine.Batch, "round", counted)
    found = rows(run(model, tokenizer, prompts(18), tmp_path / "c"))
    assert set(counts[:-6]) == {4}
    assert len(counts) < sum(len(row["response_ids"]) for row in found) / 4 + 6


def test_a_killed_run_goes_on_and_gives_the_same(model, tokenizer, tmp_path, shared, monkeypatch):
    """What was finished is kept, the model is as it was, and the corpus equals that of a run that was not killed."""
    whole = run(model, tokenizer, TURNS_2, tmp_path / "whole", SAMPLED)
    calls, ask = [], EngineAnswerer._ask

    def asked(self, batch, turn):
        calls.append(turn)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return ask(self, batch, turn)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EngineAnswerer, "_ask", asked)
        run(model, tokenizer, TURNS_2, tmp_path / "c", SAMPLED)
    assert not hasattr(model, "specbound") and len(list((tmp_path / "c" / "shards").iterdir())) > 0
    monkeypatch.setattr(EngineAnswerer, "_ask", lambda *given: calls.append(given[2]) or ask(*given))
    calls.clear()
    assert files(run(model, tokenizer, TURNS_2, tmp_path / "c", SAMPLED)) == files(whole)
    assert len(calls) < len(rows(whole))


def test_a_corpus_goes_on_as_it_was_begun_and_is_taken_where_it_is_whole(
    model, tokenizer, tmp_path, shared, monkeypatch
):
    """Padded stays padded; made alone is refused where it cannot go on so; a whole one serves both."""
    other = dataclasses.replace(OPTIONS, batch_size=9)
    alone_ = run(model, tokenizer, prompts(9), tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(train.corpus.engine, "_may_share", lambda model: False)
        padded = run(model, tokenizer, prompts(9), tmp_path / "padded")
        assert record(padded)["settings"]["batch_size"] == 4 and "batch_size" not in record(alone_)["settings"]
        assert run(model, tokenizer, prompts(9), alone_, other) == alone_
        (alone_ / "fit.parquet").unlink()
        with pytest.raises(ConfigError, match=r"other settings: batch_size \(None there, 4 now\)"):
            run(model, tokenizer, prompts(9), alone_)
    before = files(padded)
    assert run(model, tokenizer, prompts(9), padded, other) == padded
    (padded / "fit.parquet").unlink()
    monkeypatch.setattr(EngineAnswerer, "of", None)
    assert files(run(model, tokenizer, prompts(9), padded)) == before
