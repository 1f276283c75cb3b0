"""`load_specbound`: a base model and an adapter become one model whose `generate` speculates."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from runtime.adapter.folder import Adapter, load_adapter
from runtime.adapter.hub import resolve_adapter
from runtime.adapter.identity import base_fingerprint, tokenizer_fingerprint
from runtime.decoding.draft import HeadDrafter
from runtime.decoding.layers import DecoderLayers, check_supported
from runtime.drafting.controller import Controller
from runtime.drafting.heads import DraftUnembedding
from runtime.errors import AdapterError, BaseModelMismatch, ConfigError
from runtime.generate import attach
from runtime.handle import EXACTNESS, SpecBound


def load_specbound(
    adapter: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    exactness: str = "bitwise",
    adaptive: bool = True,
    graphs: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Load an adapter onto its base; `generate` then gives the base's own tokens, faster.

    Args:
        adapter: folder or Hub id.
        base_model: a loaded model, a folder or a Hub id; None takes the base the adapter names.
        revision: of the adapter's repository.
        dtype: as `from_pretrained` takes it, for a base that is loaded here.
        device_map: the same.
        token: as huggingface_hub takes it.
        cache_dir: the same.
        local_files_only: the same.
        exactness: `bitwise` (default): the bits of plain decoding. `batched`: faster; near-ties may differ.
        adaptive: draft less, or nothing for a while, where that is measured to be slower. Ids are the same.
        graphs: on a GPU, run layers as CUDA graphs over a static cache where `exactness` allows it. Not yet run on a
            GPU; on a CPU the same fixed shapes run without graphs, which is for tests.
        tokenizer: checked against the adapter's; for a base loaded here its own is.

    Returns:
        The user's ordinary model; `model.specbound` holds bounds and statistics.

    Raises:
        AdapterError: the adapter is not whole or not valid.
        BaseModelMismatch: it was fitted on another base or tokenizer.
        UnsupportedModel: the base's layers cannot be driven one by one.
        ConfigError: an argument is wrong.
    """
    if exactness not in EXACTNESS:
        raise ConfigError(f"exactness is {exactness!r}: expected one of {', '.join(EXACTNESS)}")
    if not (base_model is None or isinstance(base_model, (str, os.PathLike, PreTrainedModel))):
        raise ConfigError(
            f"base_model is a {type(base_model).__name__}: expected a transformers model, a folder or a Hub"
            " id (of a PEFT model, pass model.merge_and_unload())"
        )
    if isinstance(base_model, PreTrainedModel) and not (dtype is None and device_map is None):
        raise ConfigError(
            "dtype and device_map are for a base that is loaded here, this one is loaded: leave them out"
        )
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    loaded = load_adapter(resolve_adapter(adapter, revision=revision, **hub))
    if isinstance(base_model, PreTrainedModel):
        model = base_model
    else:
        source = str(loaded.config.base_model_name_or_path if base_model is None else base_model)
        hub["revision"] = loaded.config.base_model_revision if base_model is None else None
        if tokenizer is None:
            tokenizer = from_pretrained(AutoTokenizer, source, hub)
        options = {"dtype": dtype or "auto", "device_map": device_map}
        model = from_pretrained(AutoModelForCausalLM, source, hub | options)
    check_supported(model)
    check_base(model, tokenizer, loaded)
    specbound = make_specbound(model, loaded, exactness=exactness, graphs=graphs)
    if adaptive:
        specbound.controller = Controller()
    if not model.training:  # such a model decodes plainly, and dropout would fail the probe
        specbound.prepare(model)
    return attach(model, specbound)


def make_specbound(model: PreTrainedModel, adapter: Adapter, *, exactness: str, graphs: bool = False) -> SpecBound:
    """An adapter ready to run on this model, its heads on the model's device and in its dtype."""
    layers = DecoderLayers(model)
    config = adapter.config
    whole = config.draft_vocab_size == config.vocab_size and bool(
        (adapter.draft_to_target == torch.arange(config.vocab_size)).all()
    )
    drafter = HeadDrafter(
        heads=adapter.heads,
        unembedding=DraftUnembedding(layers, None if whole else adapter.draft_to_target),
        draft_to_target=None if whole else adapter.draft_to_target.tolist(),
        temperatures=config.temperatures,
        lookup=config.lookup,
    )
    return SpecBound(
        model,
        drafter,
        config.bounds,
        exactness=exactness,
        graphs=graphs,
        config=config,
        fingerprint=config.base_model_fingerprint,
    )


def check_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, adapter: Adapter) -> None:
    """Raise BaseModelMismatch unless the adapter was fitted on this base and this tokenizer."""
    config = adapter.config
    name = config.base_model_name_or_path
    shape = {
        "num_hidden_layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "vocab_size": model.get_output_embeddings().weight.shape[0],  # type: ignore[no-untyped-call]
    }
    for field, found in shape.items():
        if found != getattr(config, field):
            raise BaseModelMismatch(
                f"the adapter was fitted on {name} with {field} {getattr(config, field)}, this base has"
                f" {found}: load that base"
            )
    if base_fingerprint(model) != config.base_model_fingerprint:
        raise BaseModelMismatch(
            f"the adapter was fitted on {name}, this base has other weights:"
            " load that base, or fit an adapter for this one"
        )
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != config.tokenizer_fingerprint:
        raise BaseModelMismatch(
            f"the adapter was fitted with the tokenizer of {name}, this one maps text otherwise: use that one"
        )


def from_pretrained(auto: Any, source: str, options: dict[str, Any]) -> Any:
    """A base or its tokenizer, as the class of transformers' `auto` gives it; raises AdapterError where it cannot."""
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "tokenizer of the base" if auto is AutoTokenizer else "base"
        raise AdapterError(f"the {what} {source} could not be loaded (pass base_model=...): {first}") from None
