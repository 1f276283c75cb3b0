"""Hours of a plan against sums by hand."""

import pytest

from train.fitting.flops import FitFlops
from train.planning.hours import Devices
from train.planning.plan import empty_heads, estimate
from train.planning.shapes import empty_model
from train.settings.fit_config import FitConfig

ONE_PER_SECOND = {"tflops": 1.0, "bandwidth": 1.0, "utilisation": 1.0}  # seconds are 1e-12 operations + 1e-9 bytes


def test_hours_of_a_corpus_count_weights_keys_values_and_logits():
    """Llama-3.1-8B by hand: 128 answers at a time, 200 tokens before and 128 in each."""
    base = empty_model("meta-llama/Llama-3.1-8B-Instruct")
    settings = {"exit_layers": [4], "generation_batch_size": 128, "max_new_tokens": 128}
    config = FitConfig(model_name_or_path="-", prompts=["-"], output_dir="-", **settings)
    devices = Devices(1, 80, **ONE_PER_SECOND)
    found = estimate(config, base, devices, num_prompts=1280, prompt_tokens=200)
    steps = 10 * 128
    weights = 8_030_261_248 * 2
    settled = 2 * 32 * 8 * 128 * 2  # keys and values, 32 layers of 8 heads of width 128, bfloat16
    rows = 128 * (200 + 64.5) * settled
    assert rows == pytest.approx(0.276 * weights, rel=0.01)  # what was left out before
    logits = 128 * 128_256 * 12
    body = 2 * (8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096)  # without both embeddings and norms
    operations = 1280 * (328 * body + 328 * 329 // 2 * 4 * 4096 * 32 + 128 * 2 * 4096 * 128_256)
    expected = operations * 1e-12 + steps * (weights + rows + logits) * 1e-9
    assert 3600 * found.corpus_hours == pytest.approx(expected, rel=1e-6)
    eight = estimate(config, base, Devices(8, 80, **ONE_PER_SECOND), num_prompts=1280, prompt_tokens=200)
    assert eight.corpus_hours == pytest.approx(found.corpus_hours / 8)
    spread = estimate(config, base, Devices(8, 8, **ONE_PER_SECOND), num_prompts=1280, prompt_tokens=200)
    assert spread.sharded and spread.corpus_hours == pytest.approx(found.corpus_hours / 8)


@pytest.mark.parametrize(("features", "forwards"), [("online", 3), ("cache", 1)])
def test_hours_of_a_fit_count_weights_logits_and_the_optimizer(make_model, features, forwards):
    """A hundred texts of 40 + 60 tokens in 25 batches, three epochs, two linear heads of 1,000 tokens."""
    base = make_model(vocab_size=3000)
    settings = {"exit_layers": [2, 4], "draft_vocab_size": 1000, "per_device_train_batch_size": 4, "dtype": "float32"}
    settings |= {"max_new_tokens": 60, "max_length": 100, "features": features, "head": "linear"}
    config = FitConfig(model_name_or_path="-", prompts=["-"], output_dir="-", **settings)
    found = estimate(config, base, Devices(1, 80, **ONE_PER_SECOND), num_prompts=100, prompt_tokens=40)
    work = FitFlops.of(base, empty_heads(config, base))
    parameters = sum(parameter.numel() for parameter in base.parameters())
    forward = work.base(10_000, 6_000, 100 * 100 * 101 // 2) * 1e-12 + (25 * parameters * 4 + 6_000 * 3000 * 16) * 1e-9
    learning = work.heads(6_000) * 1e-12 + (6_000 * 2 * 1000 * 40 + 25 * found.head_parameters * 48) * 1e-9
    assert 3600 * found.fit_hours == pytest.approx(forwards * forward + 3 * learning)
