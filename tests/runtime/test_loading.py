"""load_specbound: a base and its adapter become one model, and nothing that does not belong together does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from runtime import (
    AdapterError,
    BaseModelMismatch,
    ConfigError,
    SpecBoundError,
    UnsupportedModel,
    detach,
    load_adapter,
    load_specbound,
    save_adapter,
)
from runtime.adapter.identity import weights_sha256
from runtime.base import check_device_map

PROMPT = torch.tensor([[5, 17, 33, 90]])


def generate(model, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(PROMPT, max_new_tokens=40, **{"do_sample": False, **options}).tolist()


def refusal(kind, *args, **options):
    """What `load_specbound` says, on one line."""
    with pytest.raises(kind) as caught:
        load_specbound(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("head", ["linear", "lora"])
@pytest.mark.parametrize("draft_vocab_size", [64, 128])
@pytest.mark.parametrize("do_sample", [False, True])
def test_generate_gives_the_tokens_of_the_stock_model(
    tmp_path, make_model, make_adapter, head, draft_vocab_size, do_sample
):
    stock = generate(make_model(), do_sample=do_sample)
    assert len(set(stock[0])) > 10
    save_adapter(make_adapter(make_model(), head=head, draft_vocab_size=draft_vocab_size), tmp_path / "a")
    model = load_specbound(tmp_path / "a", make_model())
    assert generate(model, do_sample=do_sample) == stock
    assert model.specbound.stats.drafted.total() > 0 and model.specbound.stats.emitted == 40


@pytest.mark.parametrize("exactness", ["bitwise", "batched"])
def test_from_a_folder_and_from_the_name_in_the_config(folder, base, make_model, exactness):
    stock = generate(make_model())
    for given in (base, str(base), None):
        model = load_specbound(folder, given, exactness=exactness)
        assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, type(make_model()))
        assert generate(model) == stock
        assert model.specbound.stats.drafted.total() > 0
        assert model.specbound.config == load_adapter(folder).config
        assert model.specbound.bounds == model.specbound.config.bounds


def test_the_dtype_is_that_of_the_files_unless_given(folder, base, make_model):
    assert load_specbound(folder).dtype == torch.float32
    model = load_specbound(folder, base, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert next(model.specbound.drafter.heads.exits.parameters()).dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)  # .to() would round the rotary table too
    assert generate(model) == generate(stock)


def test_the_base_stays_as_it_is_and_comes_back(folder, make_model):
    model, stock = make_model(), make_model()
    before = weights_sha256(model)
    assert load_specbound(folder, model) is model
    generate(model)
    with model.specbound.disabled():
        assert generate(model) == generate(stock)
    assert detach(model) is model
    assert type(model) is type(stock) and not hasattr(model, "specbound")
    assert weights_sha256(model) == before and generate(model) == generate(stock)
    assert detach(model) is model
    load_specbound(folder, model)


def test_a_second_adapter_on_one_model(folder, make_model):
    model = load_specbound(folder, make_model())
    assert "detach" in refusal(SpecBoundError, folder, model)
    assert generate(model) == generate(make_model())


@pytest.mark.parametrize("layer", ["model.embed_tokens", "model.layers.3.mlp.up_proj", "lm_head"])
def test_a_fine_tuned_base(folder, make_model, layer, caplog):
    """Other weights load with one warning, and their ids are those of that very base; `strict` refuses them."""
    model = make_model()
    with torch.no_grad():
        model.get_submodule(layer).weight.mul_(1.02)
    stock = generate(model)
    assert "other weights" in refusal(BaseModelMismatch, folder, model, strict=True)
    assert not hasattr(model, "specbound") and not caplog.records
    assert generate(load_specbound(folder, model)) == stock
    assert model.specbound.stats.emitted == 40
    assert ["other weights" in record.message for record in caplog.records] == [True]


def test_a_base_with_a_padding_token_added(folder, make_model):
    """The table is larger than that of the fit; ids stay the base's own."""
    model = make_model()
    model.resize_token_embeddings(136)
    stock = generate(model)
    assert generate(load_specbound(folder, model)) == stock and model.specbound.stats.emitted == 40


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("merged", [False, True])
def test_a_peft_model_is_taken_as_it_is(folder, make_model, merged):
    """Its LoRA in place or merged; a name that is no model is refused with what is expected."""
    config = LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(make_model(), config).eval()
    if merged:
        tuned.merge_adapter()
    stock = generate(tuned.get_base_model())
    assert stock != generate(make_model())
    assert generate(load_specbound(folder, tuned)) == stock
    assert tuned.get_base_model().specbound.stats.emitted == 40


def test_a_device_map_without_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, with the command that helps; without a device map accelerate is not asked for."""
    monkeypatch.setattr("runtime.base.is_accelerate_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install accelerate"):
        check_device_map("cpu")
    check_device_map(None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16': expected auto, float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"device_map": "cuda:7"}, "torch sees no such device on this machine"),
        ({"device_map": "gpu"}, "device_map is 'gpu': expected auto"),
        ({"device_map": 3.5}, "device_map is 3.5: expected auto"),
        ({"tokenizer": "x"}, "tokenizer is a str"),
        ({"revision": 3}, "revision is 3"),
        ({"exactness": None}, "exactness is None: expected one of bitwise, batched"),
        ({"base_model": ""}, "base_model is ''"),
        ({"base_model": 3}, "base_model is 3"),
        ({"adapter": None}, "adapter is None"),
        ({"adapter": 3}, "adapter is 3"),
        ({"adapter": ""}, "adapter is ''"),
    ],
)
def test_every_wrong_argument_is_told_in_one_line(folder, base, options, said):
    given = {"adapter": folder, "base_model": base} | options
    assert said in refusal(ConfigError, **given)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 7}, "num_hidden_layers 6, this base has 7"),
        ({"hidden_size": 64}, "hidden_size 32, this base has 64"),
        ({"vocab_size": 512}, "vocab_size 128, this base has 512"),
    ],
)
def test_a_base_of_another_shape(folder, make_model, changes, expected):
    assert expected in refusal(BaseModelMismatch, folder, make_model(**changes))


def test_another_tokenizer_of_the_same_size(folder, base, make_model, make_tokenizer):
    assert "tokenizer" in refusal(BaseModelMismatch, folder, make_model(), tokenizer=make_tokenizer(prefix="v"))
    padded = make_tokenizer()
    padded.pad_token = padded.eos_token  # as many users do
    load_specbound(folder, make_model(), tokenizer=padded)
    make_tokenizer(prefix="v").save_pretrained(base)
    assert "tokenizer" in refusal(BaseModelMismatch, folder, base)


def test_a_model_whose_layers_cannot_be_driven(folder, make_model):
    assert "AutoModelForCausalLM" in refusal(UnsupportedModel, folder, make_model().model)


def test_wrong_arguments(folder, base, make_model):
    assert "one of bitwise, batched" in refusal(ConfigError, folder, base, exactness="exact")
    for options in ({"dtype": torch.float32}, {"device_map": "cpu"}):
        assert "leave them out" in refusal(ConfigError, folder, make_model(), **options)
    assert "base_model is a Linear" in refusal(ConfigError, folder, torch.nn.Linear(1, 1))
    assert "revision" in refusal(ConfigError, folder, base, revision="main")


def test_a_base_or_adapter_that_is_not_there(folder, base, tmp_path, make_model, make_tokenizer):
    assert "does not exist: give the base's folder" in refusal(AdapterError, folder, tmp_path / "absent")
    assert "give the base's folder" in refusal(AdapterError, folder, "nobody/nothing")
    assert "nobody/nothing" in refusal(AdapterError, "nobody/nothing", base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "the base " in refusal(AdapterError, folder, base)
    make_model().save_pretrained(tmp_path / "no-tokenizer")
    assert "the tokenizer of the base" in refusal(AdapterError, folder, tmp_path / "no-tokenizer")
