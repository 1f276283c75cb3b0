"""The corpus: what plain generate gives, splits, turns, sampling, and refusals."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch

from runtime.errors import ConfigError, DataError
from runtime.text.prompts import Message, Prompt
from tests.helpers.corpora import EOS, OPTIONS, TURNS_2, files, prompts, record, rows, run
from train.corpus.corpus import load_split
from train.corpus.prompts import SPLITS, assign_split


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
    """Padding of the same id is cut off, the end is not."""
    first = rows(run(model, tokenizer, prompts(18), tmp_path / "a"))
    tokenizer.pad_token = "</s>"
    assert rows(run(model, tokenizer, prompts(18), tmp_path / "b")) == first
    ended = [row["response_ids"] for row in first if EOS in row["response_ids"]]
    assert ended and all(ids[-1] == EOS and EOS not in ids[:-1] for ids in ended)
    assert all(1 <= len(row["response_ids"]) <= 6 for row in first)


def test_splits_counts_and_order(model, tokenizer, tmp_path):
    """Rows lie in the split of their hash, sorted; the record counts them and what was left out."""
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
    """The files are the same, byte for byte."""
    first = run(model, tokenizer, prompts(18), tmp_path / "a")
    second = run(model, tokenizer, prompts(18)[::-1], tmp_path / "b")
    assert files(first) == files(second)


def test_a_second_turn_follows_the_models_own_first_answer(model, tokenizer, tmp_path):
    """Its prompt holds that answer, wave by wave."""
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


def test_sampling_takes_its_share_and_leaves_the_random_numbers_alone(model, tokenizer, tmp_path):
    """About half of the rows are sampled, by the seed; the state of the caller's numbers stays."""
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
    """With a top_k of 1 it would be greedy."""
    options = dataclasses.replace(OPTIONS, sample_fraction=1.0, temperature=5.0)
    model.generation_config.top_k = 1
    sampled = rows(run(model, tokenizer, prompts(18), tmp_path / "a", options))
    greedy = rows(run(model, tokenizer, prompts(18), tmp_path / "b"))
    assert [row["response_ids"] for row in sampled] != [row["response_ids"] for row in greedy]


def test_chat_template_none_is_plain_text(model, tokenizer, tmp_path):
    """A tokenizer without a template needs it; other names are refused."""
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
    """The error shows how it begins and the template's own words."""
    bad = Prompt((Message("tool", "w5"), Message("user", "w6")))
    with pytest.raises(DataError, match=r"begins 'w5': the chat template refuses .*: no tools here; change"):
        run(model, tokenizer, [bad], tmp_path / "c")


def test_no_usable_prompt(model, tokenizer, tmp_path):
    """None, or none that is short enough, is an error."""
    for asked in ([], [Prompt((Message("user", "w1 " * 60),))]):
        with pytest.raises(DataError, match=r"no prompt is left"):
            run(model, tokenizer, asked, tmp_path / str(len(asked)))


def test_prompts_leave_room_for_the_answer(model, tokenizer, tmp_path):
    """Prompt and answer fit the positions of the base together."""
    options = dataclasses.replace(OPTIONS, max_new_tokens=250, max_prompt_tokens=1024, batch_size=64)
    folder = run(model, tokenizer, prompts(18), tmp_path / "a", options)
    assert all(len(row["prompt_ids"]) <= 6 for row in rows(folder))
    counts = record(folder)["counts"]
    assert counts["too_long"] == 18 - sum(counts["rows"].values()) > 0
    with pytest.raises(ConfigError, match=r"max_new_tokens 256: expected less than the 256 positions"):
        run(model, tokenizer, prompts(9), tmp_path / "b", dataclasses.replace(OPTIONS, max_new_tokens=256))


def test_load_split_says_what_is_wrong(model, tokenizer, tmp_path):
    """No corpus, no such split, an empty one, broken files: each has its message."""
    with pytest.raises(DataError, match=r"holds no corpus; run train/distil.py"):
        load_split(tmp_path, "fit")
    with pytest.raises(ConfigError, match=r"split 'test': expected one of fit, calibration, held_out"):
        load_split(tmp_path, "test")
    options = dataclasses.replace(OPTIONS, held_out_fraction=0.0)
    folder = run(model, tokenizer, prompts(9), tmp_path / "c", options)
    with pytest.raises(DataError, match=r"the held_out split is empty"):
        load_split(folder, "held_out")
    folder = run(model, tokenizer, prompts(1) * 60, tmp_path / "d", OPTIONS)
    with pytest.raises(DataError, match=r"prompts left after cleaning: 1, 59 were duplicates of others"):
        for split in ("fit", "calibration", "held_out"):
            load_split(folder, split)
    (folder / "fit.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"fit.parquet cannot be read"):
        load_split(folder, "fit")
    (folder / "corpus.json").write_text("{")
    with pytest.raises(DataError, match=r"corpus.json cannot be read"):
        load_split(folder, "fit")
    (folder / "corpus.json").write_text("[]")
    with pytest.raises(DataError, match=r"is not the record of a corpus"):
        run(model, tokenizer, prompts(9), folder)


def test_the_unembedding_reads_dense_rows(model, tokenizer, tmp_path):
    """Also of the last positions of padded prompts, which are a slice; afterwards nobody listens to the model."""
    dense = []
    hook = model.lm_head.register_forward_hook(lambda _, args, output: dense.append(args[0].is_contiguous()))
    run(model, tokenizer, prompts(18), tmp_path / "c")
    hook.remove()
    assert len(dense) > 5 and all(dense)
    assert not model.lm_head._forward_pre_hooks


def test_special_tokens_in_the_text_of_prompts_are_counted(model, tokenizer, tmp_path, caplog):
    """The end of a turn in a user's text ends it; in a later turn too. Words of the vocabulary are none."""
    held = [Prompt((Message("user", "w5 </s> w6"),)), Prompt((Message("user", "w7 <user>"),), ("w8 <pad>",))]
    folder = run(model, tokenizer, [*prompts(9), *held], tmp_path / "c")
    assert any(EOS in row["prompt_ids"][1:-2] for row in rows(folder) if row["prompt_hash"] == held[0].hash)
    (said,) = [text for text in caplog.messages if "special tokens" in text]
    assert said.startswith("2 of 11 prompts hold special tokens in their text")
    assert "</s> in the one that begins 'w5 </s> w6'; remove them" in said and "\n" not in said
    caplog.clear()
    run(model, tokenizer, [*prompts(9), *held], tmp_path / "c")  # nothing is generated
    run(model, tokenizer, prompts(9), tmp_path / "d")
    assert not [text for text in caplog.messages if "special tokens" in text]
    folder = run(model, tokenizer, held, tmp_path / "e", dataclasses.replace(OPTIONS, chat_template="none"))
    assert any(EOS in row["prompt_ids"] for row in rows(folder))  # without a template too
    assert [text for text in caplog.messages if text.startswith("2 of 2 prompts hold special tokens")]
