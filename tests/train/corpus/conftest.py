"""A base whose answers end early or late, and a tokenizer with a chat template for it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.corpora import EOS, TEMPLATE


@pytest.fixture
def model():
    """A tiny Llama that ends some of its answers early."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        made.lm_head.weight[EOS] *= 2.5  # so that some answers end early and some do not
    return made


@pytest.fixture
def tokenizer():
    """Whole words, with a chat template that refuses tools."""
    words = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    words += [f"w{number}" for number in range(128 - len(words))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made
