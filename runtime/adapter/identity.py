"""Which base and which tokenizer: fingerprints that tell one from another. Knows nothing of adapters."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.errors import UnsupportedModel

SAMPLES_PER_TENSOR = 2048
Parameters = Iterable[tuple[str, Tensor]]


def base_fingerprint(model: PreTrainedModel, parameters: Parameters | None = None) -> str:
    """Identity of a base's weights, `sha256:` and 64 hex digits, in seconds for any size.

    Hashes name, shape and up to 2,048 evenly spaced elements of every parameter, rounded to bfloat16: weights
    stored in bfloat16 or float16 give one fingerprint whether loaded in that dtype or in float32, and float32
    weights the same in float32 and bfloat16. (They do not when rounded to float16 by the user.) Of quantised
    weights integers and scales are hashed, so that such a base is one of its own. Of a model of several kinds of
    input only what text goes through is hashed, and as if it were a model of its own.

    Args:
        parameters: name and all of each, where the model itself holds parts of them only.

    Raises:
        UnsupportedModel: where a parameter is not in memory (offloaded).
    """
    digest = hashlib.sha256()
    given = model.named_parameters() if parameters is None else parameters
    for name, tensor in plain_tensors(_of_text(model, given)):
        if tensor.is_meta:
            raise UnsupportedModel(f"parameter {name} is offloaded: load the base into memory")
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::step][:SAMPLES_PER_TENSOR].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def weights_sha256(model: PreTrainedModel, parameters: Parameters | None = None) -> str:
    """Hash of every byte of every parameter, 64 hex digits: equal before and after means nothing changed."""
    digest = hashlib.sha256()
    for name, tensor in plain_tensors(model.named_parameters() if parameters is None else parameters):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_text(model: PreTrainedModel, parameters: Parameters) -> Parameters:
    """Those of the decoder of text and the unembedding, by the names that they have in a causal language model."""
    if model.config.get_text_config() is model.config:
        return parameters
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    decoder, head = names[model.get_decoder()], names[model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    inside = ((name, each) for name, each in parameters if name.startswith((f"{decoder}.", f"{head}.")))
    return ((name.replace(decoder, "model", 1), each) for name, each in inside)


def plain_tensors(parameters: Parameters) -> Iterator[tuple[str, Tensor]]:
    """Name and plain tensor of each; of a quantised one all that it is made of."""
    for name, parameter in parameters:
        if is_traceable_wrapper_subclass(parameter):
            parts = parameter.__tensor_flatten__()[0]
            yield from plain_tensors((f"{name}.{part}", getattr(parameter, part)) for part in parts)
        else:
            yield name, parameter.detach()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what a tokenizer maps: its vocabulary and special tokens, `sha256:` and 64 hex digits.

    Not which token pads, which users set to what they like and which changes no text.
    """
    return _vocabulary_fingerprint(tokenizer, tokenizer.get_vocab())


def tokenizer_matches(tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> bool:
    """Whether a tokenizer has this fingerprint, or would have it without a padding token that was added to it."""
    vocabulary = tokenizer.get_vocab()
    if _vocabulary_fingerprint(tokenizer, vocabulary) == fingerprint:
        return True
    added = vocabulary.pop(str(tokenizer.pad_token), None)
    return added is not None and _vocabulary_fingerprint(tokenizer, vocabulary) == fingerprint


def _vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> str:
    special: dict[str, Any] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    special.pop("pad_token", None)
    text = json.dumps([sorted(vocabulary.items()), special], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
