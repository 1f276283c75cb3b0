"""Features: what transformers gives for the same text, padded batches, truncation, and the cache on disk."""

from itertools import pairwise

import pytest
import torch

from runtime.decoding.layers import DecoderLayers
from runtime.errors import DataError
from train.features.cache import FeatureCache
from train.features.extractor import FeatureExtractor, Features, Sequences

EXITS, TOP = (2, 4), 5
ROWS = [([3, 4, 5], [6, 7, 8, 9]), ([10], [11]), ([12, 13, 14, 15, 16, 17], [18, 19])]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def extract(model):
    return FeatureExtractor(DecoderLayers(model), EXITS, top_k=TOP)


@torch.no_grad()
def expected(model, prompt, response):
    """States and logits of one row alone, at the positions that predict its response."""
    output = model(torch.tensor([prompt + response]), output_hidden_states=True)
    positions = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return [state[0, positions] for state in output.hidden_states], output.logits[0, positions].float()


def assert_equal(first: Features, second: Features) -> None:
    assert first.lengths == second.lengths
    assert first.hidden.keys() == second.hidden.keys()
    for layer, hidden in first.hidden.items():
        assert torch.equal(hidden, second.hidden[layer])
    for name in ("embedding", "deep", "target", "top_ids", "top_log_probs"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_one_row_gives_the_states_and_choices_of_the_base(model, extract):
    for row in ROWS:
        found = extract([row])
        states, logits = expected(model, *row)
        assert torch.equal(found.embedding, states[0])
        for layer in EXITS:
            assert torch.equal(found.hidden[layer], states[layer])
        assert torch.equal(found.target, logits.argmax(-1))
        assert found.lengths == [len(row[1])]
        torch.testing.assert_close(found.deep, states[-1])
        best = logits.log_softmax(-1).topk(TOP)
        assert torch.equal(found.top_ids, best.indices)
        torch.testing.assert_close(found.top_log_probs, best.values)


def test_a_verified_state_of_each_age_is_of_its_own_text(extract):
    found = extract(ROWS)
    firsts = [0, *torch.tensor(found.lengths).cumsum(0).tolist()]
    for age in (0, 1, 2, 4):
        context = found.context(age)
        for first, stop in pairwise(firsts):
            for position in range(first, stop):
                known = 0 < age <= position - first
                deep = found.deep[position - age] if known else torch.zeros_like(found.deep[0])
                assert torch.equal(context.deep[position], deep)
                assert context.age[position] == (age if known else 0)
    mixed = [found.context(turn=turn).age.tolist() for turn in range(10)]
    assert {age for ages in mixed for age in ages} == {0, 1, 2, 3} and mixed[0] != mixed[1]


def test_a_padded_batch_takes_the_right_positions(model, extract):
    found = extract(ROWS)
    assert found.lengths == [4, 1, 2]
    for part, row in zip(found.split(), ROWS, strict=True):
        states, logits = expected(model, *row)
        torch.testing.assert_close(part.embedding, states[0])
        for layer in EXITS:
            torch.testing.assert_close(part.hidden[layer], states[layer], rtol=1e-4, atol=1e-4)
        assert torch.equal(part.target, logits.argmax(-1))


def test_hooks_are_gone_afterwards_even_after_an_error(model, extract):
    def hooks() -> int:
        return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.model.layers)

    before = hooks()  # transformers may have left its own
    extract(ROWS)
    with pytest.raises(IndexError):
        extract([([3, 999], [4])])
    assert hooks() == before


def test_logits_scaling_is_that_of_the_base(make_model):
    layers = DecoderLayers(make_model())
    layers.logits_scaling = 8.0
    found = FeatureExtractor(layers, EXITS, top_k=TOP)([ROWS[0]])
    _, logits = expected(layers.model, *ROWS[0])
    torch.testing.assert_close(found.top_log_probs, (logits / 8).log_softmax(-1).topk(TOP).values)


def test_more_top_tokens_than_the_vocabulary_are_all_of_it(model):
    found = FeatureExtractor(DecoderLayers(model), EXITS, top_k=999)([ROWS[0]])
    assert found.top_ids.shape == (4, 128)
    torch.testing.assert_close(found.top_log_probs.exp().sum(-1), torch.ones(4))


def test_join_and_split_are_inverse(extract):
    whole = extract(ROWS)
    assert_equal(Features.join(whole.split()), whole)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_cache_gives_back_what_was_computed(extract, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr("train.features.cache.SHARD", 2)
    sequences = Sequences(ROWS, 0)
    cache = FeatureCache(tmp_path, {"a": 1})
    assert list(cache.fill(sequences, extract, batch_size=batch_size)) == [2, 3]
    for index, row in enumerate(ROWS):
        alone = extract([row])
        found = cache[index]
        assert found.lengths == alone.lengths
        assert torch.equal(found.target, alone.target)
        torch.testing.assert_close(found.hidden[4], alone.hidden[4], rtol=1e-4, atol=1e-4)
        if batch_size == 1:
            assert_equal(found, alone)


def test_a_filled_cache_computes_nothing_and_other_settings_are_apart(extract, tmp_path):
    sequences = Sequences(ROWS, 0)
    cache = FeatureCache(tmp_path, {"a": 1})
    list(cache.fill(sequences, extract, batch_size=2))

    def refuse(rows):
        raise AssertionError("computed again")

    list(FeatureCache(tmp_path, {"a": 1}).fill(sequences, refuse, batch_size=2))
    with pytest.raises(AssertionError, match="computed again"):
        list(FeatureCache(tmp_path, {"a": 2}).fill(sequences, refuse, batch_size=2))


def test_processes_share_the_files(extract, tmp_path, monkeypatch):
    monkeypatch.setattr("train.features.cache.SHARD", 1)
    cache = FeatureCache(tmp_path, {})
    for rank in range(2):
        list(cache.fill(Sequences(ROWS, 0), extract, batch_size=2, rank=rank, world_size=2))
        assert len(list(cache.folder.glob("*.safetensors"))) == (2, 3)[rank]
    assert [cache[index].lengths for index in range(3)] == [[4], [1], [2]]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "unhashed"])
def test_a_damaged_file_is_never_read_and_computed_anew(extract, tmp_path, damage, caplog):
    sequences, cache = Sequences(ROWS, 0), FeatureCache(tmp_path, {})
    list(cache.fill(sequences, extract, batch_size=2))
    expected = cache[1]
    [path] = cache.folder.glob("*.safetensors")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 64]) + content[-8:])
    else:
        (path if damage == "gone" else path.with_suffix(".sha256")).unlink()
    again = FeatureCache(tmp_path, {})
    with pytest.raises(DataError, match="run again, to compute it anew"):
        again[1]
    list(again.fill(sequences, extract, batch_size=2))
    assert ("is not as it was written" in caplog.text) == (damage != "gone")
    assert_equal(again[1], expected)


def test_truncation_cuts_the_right_end_and_drops_what_is_empty():
    dataset = [{"prompt_ids": prompt, "response_ids": response} for prompt, response in ROWS]
    found = Sequences.from_corpus(dataset, max_length=5, name="fit")
    assert found.rows == [([3, 4, 5], [6, 7]), ([10], [11])]
    assert found.num_dropped == 1


def test_nothing_left_is_refused():
    dataset = [
        {"prompt_ids": [1, 2, 3], "response_ids": [4, 5]},
        {"prompt_ids": [1] * 9, "response_ids": [4] * 9},
    ]
    with pytest.raises(DataError, match="no assistant text is left in the fit split after truncation to 3 tokens"):
        Sequences.from_corpus(dataset, max_length=3, name="fit")


def test_features_on_another_device_are_the_same(extract):
    found = extract(ROWS)
    assert_equal(found.to("cpu"), found)
    assert found.to("meta").deep.is_meta
    assert found.to("meta").hidden[EXITS[0]].is_meta


def test_prompt_positions_are_kept_for_heads_that_attend(model, tmp_path):
    """Those just before the response; whole texts have them in front, and each state from the position before."""
    extract = FeatureExtractor(DecoderLayers(model), EXITS, top_k=TOP, prompt_tokens=3)
    found = extract(ROWS)
    assert found.prompts.lengths == [2, 0, 3]
    texts = found.texts
    cache = FeatureCache(tmp_path, {})
    assert list(cache.fill(Sequences(ROWS, 0), extract, batch_size=3)) == [3]
    for index, (part, (prompt, response)) in enumerate(zip(found.split(), ROWS, strict=True)):
        output = model(torch.tensor([prompt + response]), output_hidden_states=True)
        kept = slice(len(prompt) - 1 - part.prompts.lengths[0], len(prompt) + len(response) - 1)
        states = [state[0, kept] for state in output.hidden_states]
        number = len(states[0])
        torch.testing.assert_close(texts.embedding[index, :number], states[0])
        torch.testing.assert_close(texts.hidden[4][index, :number], states[4], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(texts.deep[index, 1:number], states[-1][:-1], rtol=1e-4, atol=1e-4)
        assert texts.start[index] == part.prompts.lengths[0] and not texts.deep[index, 0].any()
        assert texts.chosen[index].tolist() == [True] * len(response) + [False] * (4 - len(response))
        read = cache[index]
        assert_equal(read, part)
        assert read.prompts.lengths == part.prompts.lengths
        for name in ("embedding", "deep"):
            assert torch.equal(getattr(read.prompts, name), getattr(part.prompts, name))
        assert torch.equal(read.prompts.hidden[2], part.prompts.hidden[2])
    again = Features.join([cache[index] for index in range(3)])
    assert torch.equal(again.texts.deep, texts.deep)
