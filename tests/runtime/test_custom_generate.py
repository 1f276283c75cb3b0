"""`model.generate(..., custom_generate=ADAPTER)` on a plain model: the same ids, and errors that say what to do."""

import sys
from types import ModuleType

import pytest
import torch
from transformers import TextStreamer
from transformers.dynamic_module_utils import get_imports

from runtime import BaseModelMismatch, load_specbound, save_adapter
from runtime.custom_generate import generate_with
from runtime.errors import ConfigError
from tests.helpers.paths import ROOT
from train.publishing.contents import CUSTOM_GENERATE, write_custom_generate

IDS = torch.tensor([[5, 17, 33, 8, 5, 17, 60]])
GREEDY = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 16, "do_sample": False}


@pytest.fixture
def folder(make_model, make_adapter, tmp_path):
    save_adapter(make_adapter(make_model()), tmp_path / "adapter", extra=write_custom_generate)
    return tmp_path / "adapter"


def test_the_shipped_adapter_carries_this_file():
    shipped = ROOT / "adapters" / "smollm2-135m-instruct" / CUSTOM_GENERATE
    assert shipped.read_bytes() == (ROOT / "train" / "publishing" / CUSTOM_GENERATE).read_bytes()


@pytest.fixture
def model(make_model):
    return make_model()


def call(model, folder, **options):
    return model.generate(custom_generate=str(folder), trust_remote_code=True, **GREEDY | options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 20}, {"return_dict_in_generate": True}])
def test_the_ids_are_those_of_plain_generate(model, folder, options):
    torch.manual_seed(1)
    plain = model.generate(**GREEDY | options)
    torch.manual_seed(1)
    found = call(model, folder, **options)
    assert type(found) is type(plain)
    one, two = (x if isinstance(x, torch.Tensor) else x.sequences for x in (plain, found))
    assert torch.equal(one, two)
    assert model.specbound.stats.emitted > 0 and model.specbound.stats.drafted.total() > 0


def test_the_adapter_is_loaded_once_and_rests_between_calls(model, folder, monkeypatch, capsys, make_tokenizer):
    call(model, folder)
    first = model.specbound
    first.stats.rounds = 0
    plain = model.generate(**GREEDY)
    assert first.stats.rounds == 0 and not first.enabled  # it was not asked
    monkeypatch.setattr("runtime.custom_generate.load_specbound", None)
    streamed = call(model, folder, streamer=TextStreamer(make_tokenizer()))
    assert model.specbound is first and first.stats.rounds > 0 and torch.equal(streamed, plain)
    assert capsys.readouterr().out.startswith("w2 w14 w30")


def test_another_adapter_takes_its_place(model, folder, make_adapter, tmp_path):
    call(model, folder)
    first = model.specbound
    save_adapter(make_adapter(model, seed=4, exit_layers=(3,)), tmp_path / "other", extra=write_custom_generate)
    assert torch.equal(call(model, tmp_path / "other"), model.generate(**GREEDY))
    assert model.specbound is not first and model.specbound.config.exit_layers == (3,)


def test_a_model_that_has_an_adapter_already_keeps_it(model, folder):
    load_specbound(folder, model)
    mine = model.specbound
    call(model, folder)
    assert model.specbound is mine and mine.enabled


def test_errors_are_ours_and_leave_the_model_plain(model, folder, make_model, make_tokenizer):
    other = make_model(num_hidden_layers=7)
    plain = other.generate(**GREEDY)
    with pytest.raises(BaseModelMismatch, match="num_hidden_layers"):
        call(other, folder)
    with pytest.raises(BaseModelMismatch, match="tokenizer"):
        call(model, folder, tokenizer=make_tokenizer(prefix="x"))
    assert not hasattr(other, "specbound") and torch.equal(other.generate(**GREEDY), plain)
    with pytest.raises(ConfigError, match="no adapter is named"):
        generate_with(None, model, {})


@pytest.mark.parametrize("installed", [None, ModuleType("runtime")], ids=["nothing", "the other runtime"])
def test_without_the_package_the_hint_is_our_own(model, folder, monkeypatch, installed):
    """PyPI's `runtime` is an unrelated project: nobody may be told to install it."""
    monkeypatch.setitem(sys.modules, "runtime", installed)
    monkeypatch.delitem(sys.modules, "runtime.custom_generate")
    with pytest.raises(ImportError) as caught:
        call(model, folder)
    assert "run `pip install specbound`" in str(caught.value)
    assert "pip install runtime" not in str(caught.value).lower()
    assert get_imports(folder / CUSTOM_GENERATE) == ["sys"]


def test_the_shipped_adapter_has_the_same_file():
    shipped = ROOT / "adapters" / "smollm2-135m-instruct" / CUSTOM_GENERATE
    assert shipped.read_bytes() == (ROOT / "train" / "publishing" / CUSTOM_GENERATE).read_bytes()
