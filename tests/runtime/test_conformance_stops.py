"""What ends a text {plain, SpecBound}: end tokens, criteria, stop strings and time end it at the same token."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from runtime.decoding.families import CACHE
from tests.helpers.speculation import NEW_TOKENS, PROMPT, both, with_speculation


class StopAtTail(StoppingCriteria):
    """A user's criterion that looks at the last two tokens only."""

    def __init__(self, pair: tuple[int, int]) -> None:
        self.pair = torch.tensor(pair)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row ends with the pair."""
        return torch.tensor([bool((row[-2:] == self.pair).all()) for row in input_ids])


def test_eos_inside_an_accepted_block(model: Any, plain: list[int]) -> None:
    """Whichever token ends the text, nothing after it is emitted, and the cache is stock's."""
    for end in range(1, 12):
        stock, found, _ = both(
            model, inputs=PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[plain[end], 127],
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(found.sequences, stock.sequences)
        assert found[CACHE].get_seq_length() == stock[CACHE].get_seq_length()
        for mine, theirs in zip(found[CACHE].layers, stock[CACHE].layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_a_criterion_that_looks_at_the_tail(model: Any, plain: list[int]) -> None:
    """Evaluated after every token: no overrun, wherever in a block it fires."""
    for end in range(1, 12):
        criteria = StoppingCriteriaList([StopAtTail((plain[end - 1], plain[end]))])
        stock, found, _ = both(
            model, inputs=PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, stopping_criteria=criteria
        )
        assert torch.equal(found, stock) and stock.shape[1] < 7 + NEW_TOKENS


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose 128 ids are the characters of ASCII."""
    inner = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def test_stop_strings(model: Any, plain: list[int]) -> None:
    """Across tokens and blocks, with the tokenizer as stock asks for it, and stock's own error without."""
    tokenizer = letters()
    stop = chr(plain[6]) + chr(plain[7])
    stock, found, specbound = both(
        model, inputs=PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    assert torch.equal(found, stock) and stock.shape[1] < 7 + NEW_TOKENS
    assert specbound.stats.accepted.total() > 0
    with pytest.raises(ValueError, match="tokenizer") as stock_error:
        model.generate(PROMPT, max_new_tokens=4, stop_strings=[stop])
    with pytest.raises(ValueError, match="tokenizer") as found_error:
        with_speculation(model, plain, lambda: model.generate(PROMPT, max_new_tokens=4, stop_strings=[stop]))
    assert str(found_error.value) == str(stock_error.value)


def test_max_time(model: Any, plain: list[int]) -> None:
    """A time limit long past stops after one token, as stock does."""
    stock, found, _ = both(model, inputs=PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, max_time=1e-9)
    assert torch.equal(found, stock) and stock.shape[1] == 8
