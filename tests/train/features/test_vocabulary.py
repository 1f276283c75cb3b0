"""The draft vocabulary: what is chosen, in which order, and the way back."""

import torch

from train.features.vocabulary import coverage, draft_vocabulary, vocabulary_line

RESPONSES = [[5, 5, 5, 2, 2, 9], [2, 7, 5]]


def test_the_most_frequent_tokens_are_kept_in_ascending_order():
    assert draft_vocabulary(RESPONSES, size=2, vocab_size=12, keep=[]).tolist() == [2, 5]


def test_ties_go_to_the_lower_id_and_kept_ids_always_stay():
    assert draft_vocabulary(RESPONSES, size=3, vocab_size=12, keep=[]).tolist() == [2, 5, 7]
    assert draft_vocabulary(RESPONSES, size=3, vocab_size=12, keep=[11]).tolist() == [2, 5, 11]


def test_too_few_tokens_are_filled_up_with_the_lowest_ids():
    found = draft_vocabulary(RESPONSES, size=7, vocab_size=12, keep=[])
    assert found.tolist() == [0, 1, 2, 3, 5, 7, 9]
    assert found.dtype == torch.int64


def test_zero_and_the_whole_size_mean_every_token():
    for size in (0, 12, 99):
        assert draft_vocabulary(RESPONSES, size=size, vocab_size=12, keep=[]).tolist() == list(range(12))


def test_coverage_is_the_share_of_response_tokens():
    assert coverage(RESPONSES, torch.tensor([2, 5])) == 7 / 9
    assert coverage([], torch.tensor([2])) == 0.0


def test_the_line_tells_more_tokens_from_more_text():
    """Fewer different tokens than the vocabulary has: more text covers more, a larger vocabulary little."""
    rows = [([8, 8], response) for response in RESPONSES]
    assert vocabulary_line(torch.arange(7), 0.86, rows) == (
        "draft vocabulary: 7 tokens, 86.0 % of held-out text; the fit split has 4 different tokens"
    )
