"""`calibrate` as a whole: what is chosen comes from one split, what is told of it from another."""

from types import SimpleNamespace

import pytest
import torch

from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import DataError
from train.calibration import calibration
from train.calibration.calibration import calibrate, unseen_rows
from train.features.extractor import FeatureExtractor, Sequences
from train.features.split import Split
from train.replay.agreement import check_agreement

TEXTS, LENGTH, EXITS = 12, 30, [2, 4]


@pytest.fixture
def model(make_model):
    """A tiny base."""
    return make_model()


@pytest.fixture
def heads(model) -> DraftHeads:
    """Those of the base."""
    return fresh_heads(model)


def fresh_heads(model) -> DraftHeads:
    """Fresh heads that draft the whole vocabulary."""
    torch.manual_seed(0)
    exits = ExitHeads(
        "deep", EXITS, hidden_size=model.config.hidden_size, draft_vocab_size=model.config.vocab_size, rank=4
    )
    return DraftHeads.of(exits, DecoderLayers(model), torch.arange(model.config.vocab_size))


@pytest.fixture
def read() -> list[tuple[int, ...]]:
    """Texts that the base has read."""
    return []


@pytest.fixture
def split(model, read):
    """`split(seed)`: random texts."""
    extract = FeatureExtractor(DecoderLayers(model), EXITS, top_k=2)

    def counted(rows):
        read.extend(tuple(prompt + response) for prompt, response in rows)
        return extract(rows)

    counted.layers = extract.layers

    def make(seed: int, number: int = TEXTS) -> Split:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, model.config.vocab_size, (number, LENGTH), generator=generator).tolist()
        return Split(Sequences([(row[:5], row[5:]) for row in ids], 0), counted)

    return make


CONFIG = SimpleNamespace(per_device_train_batch_size=5, schedule="auto")


def test_the_base_reads_each_text_once(model, heads, split, read):
    """Heads run over the features as often as they need; the base does not. Texts that judged checkpoints are left."""
    mine, others = split(0), split(1)
    found = calibrate(CONFIG, model, heads, mine, others)
    rows = mine.sequences.rows + others.sequences.rows[TEXTS // 2 :]
    assert read == [tuple(prompt + response) for prompt, response in rows]
    assert found.traces.layers == found.unseen.layers == (0, *EXITS)
    assert len(found.traces) == TEXTS * (LENGTH - 5) == 2 * len(found.unseen)
    assert found.rows == others.sequences.rows[TEXTS // 2 :]


def test_of_long_splits_the_first_texts_are_read(model, heads, split, read, monkeypatch):
    """Texts are whole: the last one may reach over the bound. Figures say how many there were."""
    one = LENGTH - 5
    monkeypatch.setattr(calibration, "MOST_POSITIONS", 7 * one + 1)
    mine, others = split(0), split(1, 20)
    found = calibrate(CONFIG, model, heads, mine, others)
    assert len(read) == 16 and found.rows == others.sequences.rows[10:18]
    assert len(found.traces) == len(found.unseen) == 8 * one
    assert found.figures["fitted_on"] == {"positions": 8 * one, "sequences": 8} and found.figures["sequences"] == 8


def test_figures_are_of_text_that_nothing_was_chosen_on(model, heads, split):
    """Other held-out text changes the figures alone; other calibration text changes what is chosen."""
    first, second, third = (
        calibrate(CONFIG, model, heads, split(mine), split(others)) for mine, others in ((0, 1), (0, 2), (3, 1))
    )
    assert first.schedule == second.schedule and first.lookup == second.lookup
    assert first.figures["exits"] != second.figures["exits"]
    assert first.figures["negative_log_likelihood"] == second.figures["negative_log_likelihood"]
    assert first.schedule != third.schedule
    assert first.figures["fitted_on"] == {"positions": TEXTS * (LENGTH - 5), "sequences": TEXTS}
    assert first.figures["positions"] == len(first.unseen)


def test_kinds_are_compared_at_their_own_temperatures(model, heads, split):
    """The chosen kind has the figures of the exits, to the precision of a file of traces."""
    found = calibrate(CONFIG, model, heads, split(0), split(1)).figures
    for layer, figures in found["schedules"][found["schedule"]["kind"]].items():
        assert figures["brier"] == pytest.approx(found["exits"][layer]["brier_after"], abs=1e-4)
        assert figures["temperature"] == found["exits"][layer]["temperature"]


def test_without_two_tokens_nothing_can_be_told(split):
    short = split(1, 4)
    short.sequences.rows[:] = [(prompt, response[:1]) for prompt, response in short.sequences.rows]
    with pytest.raises(DataError, match="raise held_out_fraction"):
        unseen_rows(short)


def test_a_run_on_foreign_text_is_what_replay_says(model, heads, split, monkeypatch, fresh_accelerate):
    """Random text, of which the base would say next to nothing: replay and runtime count the same rounds."""
    found = calibrate(CONFIG, model, heads, split(0), split(1))
    drafter = HeadDrafter(heads, found.schedule, found.lookup)
    bounds = SpeculationBounds(0.02, 4, 4)
    compared = check_agreement(DecoderLayers(model), drafter, bounds, found.rows, found.told)
    assert compared["tokens"] == len(found.unseen) and compared["by_run"] == compared["by_replay"]
    monkeypatch.setattr("train.replay.agreement.TOKENS_SPREAD", 30)  # each round gathers every layer there
    spread = check_agreement(DecoderLayers(model), drafter, bounds, found.rows, found.told, spread=True)
    assert 30 <= spread["tokens"] < 60 < compared["tokens"] and spread["by_run"] == spread["by_replay"]


def test_so_is_one_on_the_base_own_repeats(make_model):
    """A later draft of the lookup is looked up in the text before the round, not in the text before itself."""
    small = make_model(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=64
    )
    prompts = torch.randint(3, 64, (24, 5), generator=torch.Generator().manual_seed(1))
    texts = small.generate(prompts, max_new_tokens=20, do_sample=False).tolist()
    extract = FeatureExtractor(DecoderLayers(small), EXITS, top_k=2)
    first, second = (
        Split(Sequences([(row[:5], row[5:]) for row in part], 0), extract) for part in (texts, texts[::2])
    )
    found = calibrate(CONFIG, small, fresh_heads(small), first, second)
    drafter = HeadDrafter(fresh_heads(small), found.schedule, found.lookup)
    for bounds in (
        SpeculationBounds(0.2, 0, 5, min_draft_survival=0.2),
        SpeculationBounds(0.02, 4, 15, min_draft_survival=0.05, max_branches=2, max_depth=4, sure_threshold=0.9),
    ):
        compared = check_agreement(DecoderLayers(small), drafter, bounds, found.rows, found.told)
        assert compared["by_run"] == compared["by_replay"] > 1.15
