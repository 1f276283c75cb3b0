"""`calibrate` as a whole: one pass of the base over the calibration split gives temperatures, table and traces."""

from types import SimpleNamespace

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from train.calibration.calibration import calibrate
from train.features.extractor import FeatureExtractor, Sequences
from train.features.split import Split

TEXTS, LENGTH, EXITS = 12, 30, [2, 4]


@pytest.fixture
def model(make_model):
    """A tiny base."""
    return make_model()


@pytest.fixture
def heads(model) -> DraftHeads:
    """Fresh heads that draft the whole vocabulary."""
    exits = ExitHeads(
        "deep", EXITS, hidden_size=model.config.hidden_size, draft_vocab_size=model.config.vocab_size, rank=4
    )
    return DraftHeads.of(exits, DecoderLayers(model), torch.arange(model.config.vocab_size))


def test_the_base_reads_each_text_once(model, heads):
    """Heads run over the features as often as they need; the base does not."""
    torch.manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (TEXTS, LENGTH)).tolist()
    extract, read = FeatureExtractor(DecoderLayers(model), EXITS, top_k=2), []

    def counted(rows):
        read.extend(tuple(prompt + response) for prompt, response in rows)
        return extract(rows)

    counted.layers = extract.layers
    split = Split(Sequences([(row[:5], row[5:]) for row in ids], 0), counted)
    calibration = calibrate(SimpleNamespace(per_device_train_batch_size=5, schedule="auto"), model, heads, split)
    assert read == [tuple(row) for row in ids]
    assert calibration.traces.layers == (0, *EXITS)
    assert len(calibration.traces) == TEXTS * (LENGTH - 5)
