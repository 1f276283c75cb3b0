"""The law of sampled text: every sequence of a tiny model, enumerated, against many seeded samples.

Same seeds give the same ids as stock (test_conformance); this says that they are also drawn from the right law.
"""

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

import runtime.decoding.rounds
from runtime import SpeculationBounds, detach
from runtime.decoding.accept import Accepted, accept
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

VOCABULARY, LENGTH, SAMPLES = 8, 4, 900
PROMPT = torch.tensor([[1, 4, 2]])


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama over eight tokens, its distributions far from uniform."""
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, initializer_range=0.35, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def law(model: Any) -> torch.Tensor:
    """Probability of each of the 4,096 sequences, in lexicographic order."""
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    with torch.no_grad():
        logits = model(torch.cat([PROMPT.expand(len(texts), -1), texts], dim=1)).logits.double()
    chosen = logits.log_softmax(-1)[:, PROMPT.shape[1] - 1 : -1].gather(-1, texts[..., None])
    found = chosen.sum((1, 2)).exp()
    assert found.sum() == pytest.approx(1.0, abs=1e-6)
    return found


def p_value(model: Any, law: torch.Tensor, samples: int = SAMPLES) -> float:
    """Of a chi-square test of so many samples; sequences expected less than five times count as one."""
    counts = torch.zeros(len(law))
    weights = torch.tensor([VOCABULARY**power for power in reversed(range(LENGTH))])
    attach(model, SpecBound(model, FakeHeads("random", [1, 2], vocabulary=VOCABULARY), SpeculationBounds(0.0, 2, 3)))
    try:
        torch.manual_seed(0)
        for _ in range(samples):
            text = model.generate(PROMPT, do_sample=True, max_new_tokens=LENGTH)[0, PROMPT.shape[1] :]
            counts[(text * weights).sum()] += 1
        assert model.specbound.stats.drafted.total() > 0
    finally:
        detach(model)
    expected = law * samples
    common = expected >= 5
    found = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    return float(stats.chisquare(found, wanted).pvalue)


def test_samples_follow_the_models_law(model: Any, law: torch.Tensor) -> None:
    """With drafts drawn at random, far from the model's law."""
    assert p_value(model, law) > 1e-4


def test_negative_control_a_biased_acceptance_is_seen(
    model: Any, law: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taking any draft that the target finds likely enough, as lossy methods do."""

    def biased(draft: Any, parents: Any, choose: Any) -> Accepted:
        drafted.append(draft[0] if draft else -1)
        return accept(draft, parents, choose)

    drafted = [-1]
    draw = torch.multinomial

    def likely_enough(probs: torch.Tensor, num_samples: int, generator: Any) -> torch.Tensor:
        wanted = drafted[-1]
        return (
            torch.tensor([[wanted]])
            if wanted >= 0 and probs[0, wanted] > 0.05
            else draw(probs, num_samples, generator=generator)
        )

    monkeypatch.setattr(runtime.decoding.rounds, "accept", biased)
    monkeypatch.setattr(torch, "multinomial", likely_enough)
    assert p_value(model, law, SAMPLES // 2) < 1e-4
