"""A base whose weights torchao quantised: fitted, loaded and run; it is told from the base it was made of."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from runtime import SpeculationBounds, load_specbound
from runtime.adapter.identity import base_fingerprint, weights_sha256
from runtime.errors import BaseModelMismatch

quantization = pytest.importorskip("torchao.quantization")

TEXT = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def quantised(request, tmp_path_factory, tiny_base, make_tokenizer):
    """Folder of the tiny base with int8 weights, and the dtype of all else."""
    folder, settings = tmp_path_factory.mktemp("quantised"), TorchAoConfig(quantization.Int8WeightOnlyConfig())
    dtype = getattr(torch, request.param)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype, quantization_config=settings)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, request.param


def test_it_fits_and_runs_exactly_and_is_told_from_the_base_it_was_made_of(fit, tmp_path, tiny_base, quantised):
    base, dtype = quantised
    settings = {"model_name_or_path": str(base), "dtype": dtype, "corpus_dir": None, "max_steps": 2}
    folder, lines = fit(tmp_path / "out", **settings)
    assert len(lines) == 2
    stock = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert type(stock.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    plain = stock.generate(**TEXT, max_new_tokens=24, do_sample=False)
    whole = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=stock.dtype)
    assert not torch.equal(whole.generate(**TEXT, max_new_tokens=24, do_sample=False), plain)
    model = load_specbound(folder / "adapter", base, adaptive=False)
    heads = next(iter(model.specbound.drafter.heads.exits.parameters()))
    assert str(heads.dtype) == f"torch.{dtype}"
    model.specbound.bounds = SpeculationBounds(0.0, 4, 4)  # so that every round drafts
    assert torch.equal(model.generate(**TEXT, max_new_tokens=24, do_sample=False), plain)
    stats = model.specbound.stats
    assert stats.emitted == 24 and stats.drafted.total() > 0
    with pytest.raises(BaseModelMismatch):
        load_specbound(folder / "adapter", tiny_base)


def test_a_changed_integer_or_scale_is_another_base(quantised):
    model = AutoModelForCausalLM.from_pretrained(quantised[0])
    before = base_fingerprint(model), weights_sha256(model)
    weight = model.model.layers[3].mlp.up_proj.weight
    weight.qdata[0, 0] += 1
    changed = base_fingerprint(model), weights_sha256(model)
    assert all(one != other for one, other in zip(before, changed, strict=True))
    weight.qdata[0, 0] -= 1
    assert (base_fingerprint(model), weights_sha256(model)) == before
    weight.scale[0] *= 2
    assert base_fingerprint(model) != before[0] and weights_sha256(model) != before[1]
