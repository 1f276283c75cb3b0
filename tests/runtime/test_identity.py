"""What tells one base and one tokenizer from another, and copies of models with an adapter."""

import copy
import dataclasses

import pytest
import torch

from runtime import (
    SpecBoundError,
    detach,
    load_specbound,
    save_adapter,
)
from runtime.adapter.identity import base_fingerprint, tokenizer_fingerprint, weights_sha256

PROMPT = torch.tensor([[5, 17, 33, 90]])


def generate(model, **options):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(PROMPT, max_new_tokens=16, **{"do_sample": False, **options}).tolist()


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
