"""load_specbound: a base and its adapter become one model, and nothing that does not belong together does."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig

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
from runtime.adapter.identity import base_fingerprint, tokenizer_fingerprint, weights_sha256

PROMPT = torch.tensor([[5, 17, 33, 90]])


@pytest.fixture
def base(tmp_path, make_model, make_tokenizer):
    """Folder of a tiny base with its tokenizer."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path, base, make_model, make_adapter):
    """Folder of an adapter for it."""
    made = make_adapter(make_model(), base_model_name_or_path=str(base))
    save_adapter(made, tmp_path / "adapter")
    return tmp_path / "adapter"


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


def test_mistral_is_told_how_to_do_without_its_window(folder):
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, vocab_size=128
    )
    assert "sliding_window=None" in refusal(UnsupportedModel, folder, AutoModelForCausalLM.from_config(config))


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


def test_the_fingerprint_is_that_of_the_weights_not_of_their_dtype(make_model):
    model = make_model()
    found = base_fingerprint(model)
    assert found == base_fingerprint(make_model()) != base_fingerprint(make_model(seed=1))
    assert base_fingerprint(model.to(torch.bfloat16)) == found
    assert base_fingerprint(model.float()) == found
    assert base_fingerprint(make_model(tie_word_embeddings=True)) != found


def test_the_hash_of_the_weights_sees_every_bit(make_model):
    model = make_model()
    before = weights_sha256(model)
    with torch.no_grad():
        model.lm_head.weight.view(torch.int32)[7, 9] ^= 1
    assert weights_sha256(model) != before


def test_the_fingerprint_of_a_tokenizer(make_tokenizer):
    found = tokenizer_fingerprint(make_tokenizer())
    assert found == tokenizer_fingerprint(make_tokenizer())
    more, renamed = make_tokenizer(), make_tokenizer()
    more.add_tokens(["new"])
    renamed.eos_token = "w3"
    assert len({found, *map(tokenizer_fingerprint, (more, renamed, make_tokenizer(size=127)))}) == 4


def test_an_adapter_of_the_whole_vocabulary_in_another_order(tmp_path, make_model, make_adapter):
    made = make_adapter(make_model(), draft_vocab_size=128)
    shuffled = dataclasses.replace(made, draft_to_target=made.draft_to_target.flip(0))
    save_adapter(shuffled, tmp_path / "a")
    model = load_specbound(tmp_path / "a", make_model())
    assert model.specbound.drafter.heads.draft_to_target.tolist() == list(range(127, -1, -1))
    assert generate(model) == generate(make_model())


def test_a_model_in_training_mode_is_probed_when_it_leaves_it(make_model, make_adapter, tmp_path):
    """Dropout would fail the probe; the certificate must not be one of that moment."""
    model = make_model(seed=3, attention_dropout=0.5).train()
    save_adapter(make_adapter(model), tmp_path / "adapter")
    load_specbound(tmp_path / "adapter", model)
    assert model.specbound.certificate is None
    model.eval()
    found = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=12, do_sample=False)
    assert model.specbound.certificate.bitwise
    with model.specbound.disabled():
        assert torch.equal(found, model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_an_adapter_of_its_own(base, folder, dtype):
    """`copy.deepcopy`: both speculate, as plain decoding does; nothing is shared, and one can be detached."""
    model = load_specbound(folder, str(base), dtype=dtype, adaptive=False)
    with model.specbound.disabled():
        expected = generate(model)
    assert generate(model) == expected
    copied = copy.deepcopy(model)
    assert copied.specbound is not model.specbound and type(copied) is type(model)
    model.specbound.stats.rounds = -1
    assert generate(copied) == expected and copied.specbound.stats.rounds > 0
    assert model.specbound.stats.rounds == -1 and "bit for bit" in str(copied.specbound.certificate)
    ours = {
        parameter.data_ptr() for parameter in (*model.parameters(), *model.specbound.drafter.heads.exits.parameters())
    }
    theirs = (*copied.parameters(), *copied.specbound.drafter.heads.exits.parameters())
    assert ours.isdisjoint(parameter.data_ptr() for parameter in theirs)
    with torch.no_grad():  # the copy's drafts and target are of its own weights
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    with copied.specbound.disabled():
        changed = generate(copied)
    assert changed == generate(copied) != expected == generate(model)
    detach(copied)
    assert generate(copied) == changed and not hasattr(copied, "specbound")
    assert generate(model) == expected and model.specbound.stats.rounds > 0


def test_a_copy_made_while_it_generates_is_free(base, folder):
    """The copy's lock is its own."""
    model = load_specbound(folder, str(base))
    with model.specbound.prepared.exclusive(speculating=True):
        copied = copy.deepcopy(model)
        assert generate(copied)
        with pytest.raises(SpecBoundError, match="generating already"):
            generate(model)
