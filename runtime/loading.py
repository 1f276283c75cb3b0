"""`load_specbound`: a base model and an adapter become one model whose `generate` speculates."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.adapter.folder import Adapter, load_adapter
from runtime.adapter.hub import resolve_adapter
from runtime.base import check_base, find_base, given_base, load_model, load_tokenizer
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.families import check_supported
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.controller import Controller
from runtime.drafting.draft_heads import DraftHeads
from runtime.errors import ConfigError
from runtime.generate import attach
from runtime.handle import SpecBound, require_exactness


def load_specbound(
    adapter: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
    *,
    strict: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    exactness: str = "bitwise",
    adaptive: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Load an adapter onto its base; `generate` then gives the base's own tokens, faster.

    Args:
        adapter: folder or Hub id.
        base_model: a loaded model (transformers' or PEFT's), a folder or a Hub id; None takes the base that the
            adapter names. Other weights than the adapter was fitted on are warned of: they cost drafts, never a token.
        strict: refuse other weights.
        revision: of the adapter's repository.
        dtype: as `from_pretrained` takes it, for a base that is loaded here.
        device_map: the same.
        token: as huggingface_hub takes it.
        cache_dir: the same.
        local_files_only: the same.
        exactness: `bitwise` (default): the bits of plain decoding. `batched`: faster; near-ties may differ.
        adaptive: draft less, or nothing for a while, where that is measured to be slower. Ids are the same.
        tokenizer: checked against the adapter's; for a base loaded here its own is.

    Returns:
        The user's ordinary model; `model.specbound` holds bounds and statistics.

    Raises:
        AdapterError: the adapter is not whole or not valid.
        BaseModelMismatch: it was fitted for another architecture or tokenizer, or, with `strict`, on other weights.
        UnsupportedModel: the base's layers cannot be driven one by one.
        ConfigError: an argument is wrong.
    """
    require_exactness(exactness)
    if not (tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)):
        raise ConfigError(f"tokenizer is a {type(tokenizer).__name__}: expected a tokenizer of transformers")
    if not (revision is None or isinstance(revision, str)):
        raise ConfigError(f"revision is {revision!r}: expected a branch, a tag or a commit, as text")
    given = given_base(base_model)
    if isinstance(given, PreTrainedModel) and not (dtype is None and device_map is None):
        raise ConfigError(
            "dtype and device_map are for a base that is loaded here, this one is loaded: leave them out"
        )
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    loaded = load_adapter(resolve_adapter(adapter, revision=revision, **hub))
    if isinstance(given, PreTrainedModel):
        model = given
    else:
        source = find_base(loaded.config.base_model_name_or_path) if given is None else given
        hub["revision"] = loaded.config.base_model_revision if given is None else None
        model = load_model(source, hub, dtype=dtype, device_map=device_map)
        if tokenizer is None:
            tokenizer = load_tokenizer(source, hub)
    check_supported(model)
    fingerprint = check_base(model, tokenizer, loaded, strict=strict)
    specbound = make_specbound(model, loaded, exactness=exactness, fingerprint=fingerprint)
    if adaptive:
        specbound.controller = Controller()
    if not model.training:  # such a model decodes plainly, and dropout would fail the probe
        specbound.prepare(model)
    return attach(model, specbound)


def make_specbound(
    model: PreTrainedModel,
    adapter: Adapter,
    *,
    exactness: str,
    fingerprint: str | None = None,
) -> SpecBound:
    """An adapter ready to run on this model, its heads on the model's device and in its dtype.

    Args:
        fingerprint: of this base's weights; None has it taken here.
    """
    config = adapter.config
    heads = DraftHeads.of(adapter.heads, DecoderLayers(model), adapter.draft_to_target)
    drafter = HeadDrafter(heads, config.temperatures, config.lookup)
    return SpecBound(
        model,
        drafter,
        config.bounds,
        exactness=exactness,
        config=config,
        fingerprint=fingerprint,
    )
