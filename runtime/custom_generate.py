"""`model.generate(..., custom_generate=ADAPTER)`: one call on a plain model. Knows no decoding and no files.

An adapter's `custom_generate/generate.py` comes here. The adapter stays on the model, at rest between such calls, so
that the next one need not load and probe again: `model.generate` without `custom_generate` is plain decoding.
"""

import os
from typing import Any

from transformers import PreTrainedModel

from runtime.errors import ConfigError
from runtime.generate import detach
from runtime.loading import load_specbound

# What transformers takes among the arguments of `generate` to find the file, and the model must not see.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
NOT_OURS = ("force_download", "proxies", "code_revision")


def generate_with(adapter: str | os.PathLike[str] | None, model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """Generate with an adapter, loaded where the model has not got it yet; returns what `generate` returns.

    Args:
        adapter: folder or Hub id, as given to `custom_generate`.
        arguments: of `generate`; `tokenizer`, where given, is checked against the adapter's.

    Raises:
        SpecBoundError: as for `load_specbound`; or no adapter is given.
    """
    if not isinstance(adapter, (str, os.PathLike)):
        raise ConfigError(
            'no adapter is named: call model.generate(..., custom_generate="ORG/NAME"), or load_specbound'
        )
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}
    rest = {name: value for name, value in arguments.items() if name not in (*HUB_ARGUMENTS, *NOT_OURS)}
    source = (os.fspath(adapter), hub.get("revision"))
    held: Any = getattr(model, "specbound", None)
    if held is not None and held.source is not None and held.source != source:
        detach(model)
        held = None
    if held is None:
        held = load_specbound(adapter, model, tokenizer=arguments.get("tokenizer"), **hub).specbound
        held.source, held.enabled = source, False
    before, held.enabled = held.enabled, True
    generate: Any = model.generate
    try:
        return generate(**rest)
    finally:
        held.enabled = before
