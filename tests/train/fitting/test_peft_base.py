"""A base that carries a LoRA adapter: fitted, loaded and run; another adapter on the same weights is another base."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from runtime import load_specbound
from runtime.errors import BaseModelMismatch

TEXT = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


@pytest.fixture
def carrier(tmp_path, tiny_base, make_tokenizer):
    """Folder of a LoRA adapter on the tiny base, strong enough to change what it says."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "carrier")
    make_tokenizer().save_pretrained(tmp_path / "carrier")
    return tmp_path / "carrier"


def test_it_fits_and_runs_and_is_told_from_the_bare_base(fit, tmp_path, tiny_base, carrier):
    folder, lines = fit(tmp_path / "out", model_name_or_path=str(carrier), corpus_dir=None, max_steps=2)
    assert len(lines) == 2
    stock = AutoModelForCausalLM.from_pretrained(carrier)
    plain = stock.generate(**TEXT, max_new_tokens=16, do_sample=False)
    bare = AutoModelForCausalLM.from_pretrained(tiny_base).generate(**TEXT, max_new_tokens=16, do_sample=False)
    assert not torch.equal(plain, bare)
    model = load_specbound(folder / "adapter", AutoModelForCausalLM.from_pretrained(carrier))
    assert torch.equal(model.generate(**TEXT, max_new_tokens=16, do_sample=False), plain)
    assert model.specbound.stats.emitted == 16
    with pytest.raises(BaseModelMismatch):
        load_specbound(folder / "adapter", tiny_base, strict=True)
