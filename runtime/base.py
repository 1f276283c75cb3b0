"""The base model of an adapter: found, loaded, and compared with the one that the adapter was fitted on."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_accelerate_available

from runtime.adapter.folder import Adapter
from runtime.adapter.hub import chain_of, is_hub_id, kept_base, patiently
from runtime.adapter.identity import base_fingerprint, tokenizer_matches
from runtime.decoding.families import check_config
from runtime.decoding.wrappers import WRAPPERS
from runtime.errors import AdapterError, BaseModelMismatch, ConfigError, UnsupportedModel, one_line

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Rows that a table may have more than the heads know: a padding token was added, and the size rounded up.
MAX_ADDED_ROWS = 256
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
# Bases that a script can put here without the Hub.
FETCHED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "python scripts/fetch_smollm2.py"}
REMEDY = "give the base's folder or Hub id (base_model in Python, --model in a shell, model_name_or_path in a recipe)"


def find_base(name: str) -> str:
    """Where the base that an adapter names is: a folder, one that was fetched for this id, or the id itself."""
    kept = kept_base(name)
    is_kept = not Path(name).is_dir() and is_hub_id(name) and (kept / "config.json").is_file()
    return str(kept) if is_kept else name


def load_model(name: str, options: dict[str, Any], *, dtype: Any = None, device_map: Any = None) -> PreTrainedModel:
    """The base in a folder or on the Hub; its config is looked at before its weights are loaded.

    Args:
        options: of the Hub, as `from_pretrained` takes them.

    Raises:
        AdapterError: it cannot be loaded.
        ConfigError: dtype or device_map is wrong.
        UnsupportedModel: its layers cannot be driven one by one.
    """
    check_dtype(dtype)
    check_device_map(device_map)
    config = base_config(name, options)
    how = options | {"dtype": dtype or "auto", "device_map": device_map}
    model: PreTrainedModel = from_pretrained(auto_class(config), name, how)
    return model


def load_tokenizer(name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a base; raises AdapterError where it cannot be loaded."""
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, name, options)
    return tokenizer


def auto_class(config: Any) -> Any:
    """The class of transformers' that makes a base of its config; None is that of an adapter of PEFT's."""
    wraps = config is not None and config.model_type in WRAPPERS
    return AutoModelForImageTextToText if wraps else AutoModelForCausalLM


def base_config(name: str, options: dict[str, Any]) -> Any:
    """A base's config; None for an adapter of PEFT's. Raises UnsupportedModel where its layers cannot be driven."""
    try:
        config = from_pretrained(AutoConfig, name, options)
    except AdapterError as error:
        if Path(name, "adapter_config.json").is_file() or any(
            isinstance(cause, EntryNotFoundError) for cause in chain_of(error)
        ):
            return None  # an adapter of PEFT's: it has no config, and transformers finds its base
        raise
    check_config(config)
    return config


def from_pretrained(auto: Any, name: str, options: dict[str, Any]) -> Any:
    """What the class of transformers' `auto` gives for a base.

    Raises:
        AdapterError: it gives nothing.
    """
    what = {AutoTokenizer: "tokenizer of the base", AutoConfig: "config of the base"}.get(auto, "base")
    if not Path(name).is_dir() and not is_hub_id(name):
        raise AdapterError(f"the folder {name} of the base does not exist: {REMEDY}")
    try:
        return patiently(lambda: auto.from_pretrained(name, **options))
    except Exception as error:  # files, formats, devices and transport: each library has errors of its own
        if Path(name).is_dir():
            raise AdapterError(f"the {what} {name} could not be loaded: {one_line(error)}; {REMEDY}") from error
        remedy = f"run `{FETCHED[name]}` in SpecBound's checkout" if name in FETCHED else REMEDY
        raise AdapterError(
            f"the {what} {name} is no folder here, and the Hub could not give it ({one_line(error)}): {remedy}"
        ) from error


def check_dtype(dtype: Any) -> None:
    """Raise a ConfigError unless `from_pretrained` knows this dtype."""
    is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not (dtype is None or is_float or (isinstance(dtype, str) and dtype in DTYPES)):
        raise ConfigError(f"dtype is {dtype!r:.100}: expected {', '.join(DTYPES)}, or a floating dtype of torch")


def check_device_map(device_map: Any) -> None:
    """Raise a ConfigError where accelerate is missing, or this machine has no such device."""
    if device_map is not None and not is_accelerate_available():
        raise ConfigError(f"device_map {device_map!r:.100} needs the package accelerate: pip install accelerate")
    for place in device_map.values() if isinstance(device_map, dict) else (device_map,):
        if place is None or place == "disk" or (isinstance(place, str) and place in PLACEMENTS):
            continue
        try:
            device = torch.device(place)
        except (RuntimeError, TypeError):
            expected = f"{', '.join(PLACEMENTS)}, a device such as 'cuda:0', or a dict of them"
            raise ConfigError(f"device_map is {device_map!r:.100}: expected {expected}") from None
        if device.type not in ("cpu", "meta") and not _has_device(device):
            raise ConfigError(f"device_map is {device_map!r:.100}, but torch sees no such device on this machine")


def _has_device(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return (
        accelerator is not None
        and accelerator.type == device.type
        and (device.index or 0) < torch.accelerator.device_count()
    )


def given_base(base_model: Any) -> PreTrainedModel | str | None:
    """The model or the name that was given as the base; of a PEFT model, the transformers model inside it.

    Raises:
        ConfigError: it is neither.
        UnsupportedModel: a PEFT model that changes the prompt instead of the model.
    """
    if base_model is None or isinstance(base_model, PreTrainedModel):
        return base_model
    if isinstance(base_model, (str, os.PathLike)) and os.fspath(base_model):
        return str(base_model)
    inner = _inside_peft(base_model)
    if inner is None:
        given = repr(base_model) if isinstance(base_model, (str, int, float)) else f"a {type(base_model).__name__}"
        raise ConfigError(f"base_model is {given:.100}: expected a transformers model, a folder or a Hub id")
    return inner


def _inside_peft(given: Any) -> PreTrainedModel | None:
    """The transformers model inside a PEFT model, with its LoRA layers in place; None where it is none."""
    model: Any = given
    if not (isinstance(given, torch.nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return None
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UnsupportedModel(
            "this PEFT model puts learned tokens before the prompt: only LoRA and its kin are supported"
        )
    inner: Any = model.get_base_model()
    return inner if isinstance(inner, PreTrainedModel) else None


def check_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, adapter: Adapter, *, strict: bool
) -> str:
    """Compare a base with the one that the adapter was fitted on; returns the base's fingerprint.

    Other weights of the same architecture and tokenizer cost drafts, never a token: they are warned of.

    Args:
        strict: refuse other weights.

    Raises:
        BaseModelMismatch: another architecture or tokenizer, or other weights where those are refused.
    """
    config = adapter.config
    name = config.base_model_name_or_path
    text = model.config.get_text_config()
    shape = {
        "num_hidden_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": model.get_output_embeddings().weight.shape[0],  # type: ignore[no-untyped-call]
    }
    for field, given in shape.items():
        wanted = getattr(config, field)
        more = MAX_ADDED_ROWS if field == "vocab_size" else 0
        if not wanted <= given <= wanted + more:
            raise BaseModelMismatch(
                f"the adapter was fitted on {name} with {field} {wanted}, this base has {given}: load that base"
            )
    if tokenizer is not None and not tokenizer_matches(tokenizer, config.tokenizer_fingerprint):
        raise BaseModelMismatch(
            f"the adapter was fitted with the tokenizer of {name}, this one maps text otherwise: use that one"
        )
    fingerprint = base_fingerprint(model)
    if fingerprint != config.base_model_fingerprint:
        if strict:
            raise BaseModelMismatch(
                f"the adapter was fitted on {name}, this base has other weights: load that base, or leave out strict"
            )
        logger.warning(
            "SpecBound: the adapter was fitted on %s, this base has other weights: every token is this base's own, but"
            " fewer drafts may be accepted.",
            name,
        )
    return fingerprint
