"""Fits from data as teams have it, end to end: a ShareGPT file, a parquet file of answers; and a dry run."""

import json
import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from runtime import load_specbound
from runtime.errors import DataError
from tests.helpers.publication import hashes
from train import fit_exits
from train.corpus.answers import Answerer
from train.settings.fit_config import FitConfig, parse_config


def words(numbers: random.Random, most: int = 8) -> str:
    return " ".join(f"w{numbers.randrange(100)}" for _ in range(numbers.randrange(2, most)))


@pytest.fixture
def talks() -> list[list[dict[str, str]]]:
    """ShareGPT conversations of one or two turns."""
    numbers = random.Random(1)

    def talk(turns: int) -> list[dict[str, str]]:
        return [
            {"from": role, "value": words(numbers, 30 if role == "gpt" else 8)}
            for _ in range(turns)
            for role in ("human", "gpt")
        ]

    return [talk(1 + index % 2) for index in range(80)]


def test_a_sharegpt_file_is_answered_turn_by_turn(fit, tmp_path, talks):
    """And the adapter drafts exactly."""
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"id": str(index), "conversations": talk} for index, talk in enumerate(talks)]))
    folder, _ = fit(tmp_path / "out", prompts=[str(path)], corpus_dir=str(tmp_path / "corpus"))
    counts = json.loads((tmp_path / "corpus" / "corpus.json").read_text())["counts"]
    assert sum(counts["rows"].values()) == 120 and "greedy_agreement" not in counts
    assert "text like its own answers" in (folder / "adapter" / "README.md").read_text()
    model = load_specbound(folder / "adapter")
    prompt = torch.tensor([[4, 5, 6]])
    with model.specbound.disabled():
        plain = model.generate(prompt, max_new_tokens=20, do_sample=False).tolist()
    assert model.generate(prompt, max_new_tokens=20, do_sample=False).tolist() == plain


def test_a_parquet_file_of_answers_is_kept(fit, tmp_path, talks, caplog):
    """Without generating; corpus, log and card say how much of it the base would have said."""
    path, corpus = tmp_path / "answers.parquet", tmp_path / "corpus"
    pairs = [(talk[0]["value"], talk[1]["value"]) for talk in talks]
    pq.write_table(pa.table({"question": [q for q, _ in pairs], "reply": [a for _, a in pairs]}), path)
    source = f"{path}?column=question&answer=reply"
    folder, _ = fit(
        tmp_path / "out",
        prompts=[source],
        corpus_dir=str(corpus),
        answers="keep",
        max_new_tokens=30,
        calibration_fraction=0.4,
    )
    counts = json.loads((corpus / "corpus.json").read_text())["counts"]
    given = sum(len(answer.split()) + 1 for _, answer in pairs)  # each with an end of a turn, as the base has none
    assert sum(counts["rows"].values()) == len(pairs)
    assert sum(counts["response_tokens"].values()) == given
    assert counts["greedy_agreement"] < 0.2 and caplog.text.count("`answers: distil`") == 1
    assert "text like given answers (" in (folder / "adapter" / "README.md").read_text()


def test_texts_without_roles_are_kept_whole(fit, tmp_path):
    """Each follows its own first token, which many share."""
    numbers = random.Random(2)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{n % 2} " + words(numbers, 30)}) + "\n" for n in range(80)))
    folder, _ = fit(
        tmp_path / "out", prompts=[str(path)], corpus_dir=str(tmp_path / "c"), answers="keep", calibration_fraction=0.4
    )
    calibrated = json.loads((folder / "adapter" / "calibration.json").read_text())
    assert calibrated["fitted_on"]["sequences"] > 20 and calibrated["corpus"]["greedy_agreement"] < 0.3


def test_a_recipe_mixes_sources(tmp_path):
    recipe = tmp_path / "fit.yaml"
    recipe.write_text(
        "model_name_or_path: base\nexit_layers: [2]\noutput_dir: out\nprompts:\n"
        "  - plain.jsonl\n  - {path: my answers.csv, weight: 0.5, column: question, limit: 10}\n"
        "  - {path: org/set, split: 'test[:5%]', streaming: true, limit: 3}\n"
    )
    assert parse_config(["--config", str(recipe)]).prompts == [
        "plain.jsonl",
        "my answers.csv?weight=0.5&column=question&limit=10",
        "org/set?split=test%5B%3A5%25%5D&streaming=true&limit=3",
    ]


def test_a_dry_run_says_what_the_fit_takes(make_recipe, fresh_accelerate, tmp_path, capsys, monkeypatch):
    """Steps are those of the fit; nothing is written, not even a folder."""
    before = hashes(tmp_path)
    config = FitConfig(**make_recipe(tmp_path / "out", corpus_dir=None, max_steps=-1, dry_run=True))
    fit_exits.main(config)
    said = capsys.readouterr().out
    for part in ("120 turns", "steps ", "corpus ", "fit ", "memory ", "disk ", "nothing was written"):
        assert part in said, said
    assert hashes(tmp_path) == before and not (tmp_path / "out").exists()
    rows = int(re.search(r"[(, ]fit (\d+)[,)]", said)[1])
    steps = -(-rows // config.per_device_train_batch_size)
    assert f"steps       {3 * steps}, {steps} an epoch" in said


def test_a_dry_run_answers_nothing_where_a_corpus_is(make_recipe, fresh_accelerate, tmp_path, capsys, monkeypatch):
    """On a real base that takes minutes."""
    fit_exits.main(FitConfig(**make_recipe(tmp_path / "out", max_steps=1)))
    config = FitConfig(**make_recipe(tmp_path / "next", dry_run=True))
    monkeypatch.setattr(Answerer, "answer", None)
    fit_exits.main(config)
    assert f"corpus      complete in {config.corpus_path}" in capsys.readouterr().out


def test_a_dry_run_finds_what_would_stop_the_fit(make_recipe, fresh_accelerate, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "w1"}\n')
    path.write_text('{"prompt": "w1"}\n' * 60)
    told = r"would be empty \(prompts left after cleaning: 1, 59 were duplicates of others\): give more prompts"
    with pytest.raises(DataError, match=told):
        fit_exits.main(FitConfig(**make_recipe(tmp_path / "out", prompts=[str(path)], dry_run=True)))


def test_a_dry_run_tells_of_special_tokens(make_recipe, fresh_accelerate, tmp_path, capsys):
    """In prompts and in answers that are kept, with a chat template or without."""
    path = tmp_path / "special.jsonl"
    rows = [{"prompt": f"w{n} <pad> w{n + 1}", "response": f"w{n} <pad> w3"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for answers, number in (("distil", 1), ("keep", 2)):
        fit_exits.main(FitConfig(**make_recipe(tmp_path / "out", prompts=[str(path)], answers=answers, dry_run=True)))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens ")]
        assert len(lines) == number and "60 of 60 prompts hold special tokens" in lines[0]
        assert answers == "distil" or "60 of 60 answers hold special tokens" in lines[1]
