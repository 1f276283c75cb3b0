"""The corpus: what plain generate gives, kill and resume, shared work, splits, and refusals."""

import dataclasses
import json
import logging
import shutil
import threading

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.errors import ConfigError, DataError
from runtime.text.prompts import Message, Prompt
from train.corpus.answers import Answerer
from train.corpus.corpus import distil, load_split
from train.corpus.options import CorpusOptions
from train.corpus.prompts import SPLITS, assign_split

EOS = 1
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}> {{ message['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = CorpusOptions(max_new_tokens=6, max_prompt_tokens=40, batch_size=4)
TURNS_2 = [Prompt((Message("user", f"w{n} w{n + 1}"),), ("w9 w8",) * (n % 3)) for n in range(14)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        made.lm_head.weight[EOS] *= 2.5  # so that some answers end early and some do not
    return made


@pytest.fixture
def tokenizer():
    words = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    words += [f"w{number}" for number in range(128 - len(words))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def prompts(count: int) -> list[Prompt]:
    return [Prompt((Message("user", " ".join(f"w{n + k}" for k in range(1 + n % 5))),)) for n in range(count)]


def rows(folder) -> list[dict]:
    return [row for split in SPLITS for row in pq.read_table(folder / f"{split}.parquet").to_pylist()]


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record(folder) -> dict:
    return json.loads((folder / "corpus.json").read_text())


def run(model, tokenizer, asked, folder, options=OPTIONS, **others):
    return distil(model, tokenizer, asked, folder, options, progress=False, **others)


def test_responses_are_those_of_plain_generate(model, tokenizer, tmp_path):
    """Each shard again, through the tokenizer's own padding and generate's own defaults."""
    folder = run(model, tokenizer, prompts(18), tmp_path / "c")
    tokenizer.padding_side = "left"
    shards = sorted((folder / "shards").iterdir())
    assert [path.name for path in shards] == [f"wave-0-batch-{index:05d}.parquet" for index in range(5)]
    by_text = {}
    for prompt in prompts(18):
        chat = [{"role": "user", "content": prompt.messages[0].content}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        by_text[prompt.hash] = ids
    num_ended = 0
    for shard in shards:
        table = pq.read_table(shard).to_pylist()
        assert [row["prompt_ids"] for row in table] == [by_text[row["prompt_hash"]] for row in table]
        inputs = tokenizer.pad({"input_ids": [row["prompt_ids"] for row in table]}, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        for row, expected in zip(table, output.tolist(), strict=True):
            ended = EOS in expected
            assert row["response_ids"] == (expected[: expected.index(EOS) + 1] if ended else expected)
            num_ended += ended
    assert 0 < num_ended < 18  # both ends are covered


def test_the_end_of_sequence_is_kept_once_also_where_it_is_the_padding(model, tokenizer, tmp_path):
    first = rows(run(model, tokenizer, prompts(18), tmp_path / "a"))
    tokenizer.pad_token = "</s>"
    assert rows(run(model, tokenizer, prompts(18), tmp_path / "b")) == first
    ended = [row["response_ids"] for row in first if EOS in row["response_ids"]]
    assert ended and all(ids[-1] == EOS and EOS not in ids[:-1] for ids in ended)
    assert all(1 <= len(row["response_ids"]) <= 6 for row in first)


def test_splits_counts_and_order(model, tokenizer, tmp_path):
    evaluation = tmp_path / "e.jsonl"
    evaluation.write_text(json.dumps({"prompt": prompts(40)[7].messages[0].content}))
    options = dataclasses.replace(OPTIONS, evaluation_files=(str(evaluation),), held_out_fraction=0.3)
    long = Prompt((Message("user", "w1 " * 60),))
    asked = [*prompts(40), *prompts(3), long]
    folder = run(model, tokenizer, asked, tmp_path / "c", options)
    read = {split: load_split(folder, split) for split in SPLITS}
    for split, data in read.items():
        digests = data["prompt_hash"][:]
        assert digests == sorted(digests)
        fractions = {"calibration_fraction": 0.1, "held_out_fraction": 0.3}
        assert {assign_split(digest, **fractions) for digest in digests} == {split}
    counts = record(folder)["counts"]
    assert (counts["prompts"], counts["duplicates"], counts["sharing_13_words"], counts["too_long"]) == (
        40,
        3,
        1,
        1,
    )
    assert counts["rows"] == {split: len(data) for split, data in read.items()}
    assert sum(counts["rows"].values()) == 39
    tokens = {split: sum(map(len, data["response_ids"][:])) for split, data in read.items()}
    assert counts["response_tokens"] == tokens
    assert str(read["fit"].features["prompt_ids"]) == "List(Value('int32'))"


def test_the_order_of_the_prompts_does_not_matter(model, tokenizer, tmp_path):
    first = run(model, tokenizer, prompts(18), tmp_path / "a")
    second = run(model, tokenizer, prompts(18)[::-1], tmp_path / "b")
    assert files(first) == files(second)


def test_a_second_turn_follows_the_models_own_first_answer(model, tokenizer, tmp_path):
    found = rows(run(model, tokenizer, TURNS_2, tmp_path / "c"))
    answers = {(row["prompt_hash"], row["wave"]): row for row in found}
    assert sorted(answers) == sorted((p.hash, wave) for p in TURNS_2 for wave in range(1 + len(p.later_turns)))
    for prompt in TURNS_2:
        chat = [{"role": "user", "content": prompt.messages[0].content}]
        for wave, question in enumerate(prompt.later_turns, start=1):
            own = tokenizer.decode(answers[prompt.hash, wave - 1]["response_ids"], skip_special_tokens=True)
            chat += [{"role": "assistant", "content": own}, {"role": "user", "content": question}]
            expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            assert answers[prompt.hash, wave]["prompt_ids"] == expected


@pytest.mark.parametrize("stop_after", [0, 1, 4, 6])
@pytest.mark.parametrize("sample_fraction", [0.0, 0.5])
def test_a_killed_run_goes_on_and_gives_the_same(model, tokenizer, tmp_path, monkeypatch, stop_after, sample_fraction):
    options = dataclasses.replace(OPTIONS, sample_fraction=sample_fraction, temperature=1.3, top_p=0.9)
    whole = run(model, tokenizer, TURNS_2, tmp_path / "whole", options)
    num_batches = len(list((whole / "shards").iterdir()))
    plain, calls = Answerer.answer, []

    def answer(self, batch, *, name):
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
    folder = run(model, tokenizer, prompts(18), tmp_path / "c", fingerprint="one")
    (folder / "corpus.json").unlink()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    run(model, tokenizer, prompts(18), folder, fingerprint="two")
    fresh = run(model, tokenizer, prompts(18), tmp_path / "d", fingerprint="two")
    assert files(folder) == files(fresh)


def test_a_complete_corpus_is_returned_at_once(model, tokenizer, tmp_path, monkeypatch):
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
    folder = run(model, tokenizer, prompts(9), tmp_path / "c", fingerprint="one")
    other = dataclasses.replace(OPTIONS, max_new_tokens=7, top_p=0.5)
    with pytest.raises(ConfigError, match=r"settings: max_new_tokens \(6 there, 7 now\), top_p \(1.0 there") as caught:
        run(model, tokenizer, prompts(9), folder, other, fingerprint="one")
    assert "\n" not in str(caught.value)
    for key, others in {"model": {"fingerprint": "two"}, "prompts": {"asked": prompts(8)}}.items():
        arguments = {"asked": prompts(9), "fingerprint": "one"} | others
        with pytest.raises(ConfigError, match=rf"settings: {key} \("):
            run(model, tokenizer, folder=folder, **arguments)
    tokenizer.chat_template = TEMPLATE + " "
    with pytest.raises(ConfigError, match=r"settings: tokenizer \("):
        run(model, tokenizer, prompts(9), folder, fingerprint="one")


def test_two_processes_give_what_one_gives(model, tokenizer, tmp_path):
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
    meeting, answered = threading.Barrier(2, timeout=20), []
    generate = Answerer.answer

    def together(self, batch, *, name):
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
    with pytest.raises(DataError, match=r"batch-00001.parquet is not there"):
        run(model, tokenizer, prompts(18), tmp_path / "c", rank=0, world_size=2)


def test_sampling_takes_its_share_and_leaves_the_random_numbers_alone(model, tokenizer, tmp_path):
    options = dataclasses.replace(OPTIONS, sample_fraction=0.5, temperature=2.0)
    asked = [Prompt((Message("user", f"w{n} w{n // 2} w{n // 3}"),)) for n in range(100)]
    before = torch.get_rng_state()
    mixed = rows(run(model, tokenizer, asked, tmp_path / "a", options))
    assert torch.equal(before, torch.get_rng_state())
    assert 35 <= sum(row["sampled"] for row in mixed) <= 65
    greedy = {row["prompt_hash"]: row for row in rows(run(model, tokenizer, asked, tmp_path / "b"))}
    differs = [row["response_ids"] != greedy[row["prompt_hash"]]["response_ids"] for row in mixed if row["sampled"]]
    assert sum(differs) > len(differs) / 2
    other_seed = dataclasses.replace(options, seed=1)
    assert rows(run(model, tokenizer, asked, tmp_path / "c", other_seed)) != mixed


def test_sampling_is_not_cut_by_the_models_own_top_k(model, tokenizer, tmp_path):
    options = dataclasses.replace(OPTIONS, sample_fraction=1.0, temperature=5.0)
    model.generation_config.top_k = 1
    sampled = rows(run(model, tokenizer, prompts(18), tmp_path / "a", options))
    greedy = rows(run(model, tokenizer, prompts(18), tmp_path / "b"))
    assert [row["response_ids"] for row in sampled] != [row["response_ids"] for row in greedy]


def test_chat_template_none_is_plain_text(model, tokenizer, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"`chat_template: none`"):
        run(model, tokenizer, prompts(9), tmp_path / "a")
    options = dataclasses.replace(OPTIONS, chat_template="none")
    found = {row["prompt_hash"]: row for row in rows(run(model, tokenizer, prompts(9), tmp_path / "a", options))}
    for prompt in prompts(9):
        assert found[prompt.hash]["prompt_ids"] == tokenizer(prompt.messages[0].content)["input_ids"]
    with pytest.raises(ConfigError, match=r"chat_template 'chatml': expected auto or none"):
        run(model, tokenizer, prompts(9), tmp_path / "b", dataclasses.replace(OPTIONS, chat_template="chatml"))


def test_a_prompt_the_template_refuses_is_named(model, tokenizer, tmp_path):
    bad = Prompt((Message("tool", "w5"), Message("user", "w6")))
    with pytest.raises(DataError, match=r"begins 'w5': the chat template refuses .*: no tools here; change"):
        run(model, tokenizer, [bad], tmp_path / "c")


def test_no_usable_prompt(model, tokenizer, tmp_path):
    for asked in ([], [Prompt((Message("user", "w1 " * 60),))]):
        with pytest.raises(DataError, match=r"no prompt is left"):
            run(model, tokenizer, asked, tmp_path / str(len(asked)))


def test_prompts_leave_room_for_the_answer(model, tokenizer, tmp_path):
    options = dataclasses.replace(OPTIONS, max_new_tokens=250, max_prompt_tokens=1024, batch_size=64)
    folder = run(model, tokenizer, prompts(18), tmp_path / "a", options)
    assert all(len(row["prompt_ids"]) <= 6 for row in rows(folder))
    counts = record(folder)["counts"]
    assert counts["too_long"] == 18 - sum(counts["rows"].values()) > 0
    with pytest.raises(ConfigError, match=r"max_new_tokens 256: expected less than the 256 positions"):
        run(model, tokenizer, prompts(9), tmp_path / "b", dataclasses.replace(OPTIONS, max_new_tokens=256))


def test_load_split_says_what_is_wrong(model, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"holds no corpus; run train/distil.py"):
        load_split(tmp_path, "fit")
    with pytest.raises(ConfigError, match=r"split 'test': expected one of fit, calibration, held_out"):
        load_split(tmp_path, "test")
    options = dataclasses.replace(OPTIONS, held_out_fraction=0.0)
    folder = run(model, tokenizer, prompts(9), tmp_path / "c", options)
    with pytest.raises(DataError, match=r"the held_out split is empty"):
        load_split(folder, "held_out")
    (folder / "fit.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"fit.parquet cannot be read"):
        load_split(folder, "fit")
    (folder / "corpus.json").write_text("{")
    with pytest.raises(DataError, match=r"corpus.json cannot be read"):
        load_split(folder, "fit")
    (folder / "corpus.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not the record of a corpus"):
        run(model, tokenizer, prompts(9), folder)


def test_progress_is_shown_on_rank_0_alone(model, tokenizer, tmp_path, capsys):
    distil(model, tokenizer, prompts(9), tmp_path / "a", OPTIONS, rank=1, world_size=2)
    assert "batch" not in capsys.readouterr().err
    distil(model, tokenizer, prompts(9), tmp_path / "a", OPTIONS, rank=0, world_size=2)
    shown = capsys.readouterr().err
    assert "wave 0" in shown and "tokens/s" in shown
