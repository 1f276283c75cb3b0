"""`Waiting`: a call of `generate` that stock has prepared, and that will run later, together with others."""

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from runtime.errors import ConfigError
from runtime.exact.fingerprint import STOCK


class Waiting(BaseStreamer):
    """Stands in the place of a call's streamer, and takes what stock's `generate` hands to its loop.

    Args:
        streamer: the call's own, told the prompt.
        seed: of the call's own random numbers; None where it draws from torch's.
        device: on which it samples.
    """

    def __init__(self, streamer: Any, seed: int | None, device: torch.device) -> None:
        self.streamer, self.seed, self.device = streamer, seed, device
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.given: tuple[Any, ...] = ()
        self.model_kwargs: dict[str, Any] = {}
        self.reason: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt: as ids, as embeddings, or as the mask has them, behind a cache of the caller's."""
        others = (self.model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask"))
        return max(int(each.shape[1]) for each in (self.given[0], *others) if each is not None)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer at most."""
        input_ids, _, criteria, config, *_ = self.given
        answer = int(criteria.max_length or config.max_length) - int(input_ids.shape[1])
        return self.prompt_tokens + max(0, answer)

    def put(self, value: Any) -> None:
        """Told the prompt by `generate`, before its loop."""
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Never called: the loop has not run."""

    def take(self, given: tuple[Any, ...], model_kwargs: dict[str, Any], reason: str | None) -> "Waiting":
        """Keep the loop's arguments.

        Args:
            given: input ids, processors, criteria, config, `synced_gpus` and this.
            reason: why the call cannot speculate; None where it can.
        """
        self.given, self.model_kwargs, self.reason = (*given[:-1], self.streamer), model_kwargs, reason
        return self


def wait(model: Any, input_ids: Any, streamer: Any, seed: int | None, options: dict[str, Any]) -> Waiting:
    """A call of `generate`, prepared by stock.

    Args:
        input_ids: a list, or shape [1, T].
        options: as `generate` takes them.

    Raises:
        ConfigError: it is for beam search or assisted decoding.
        ValueError: what `generate` itself refuses.
    """
    ids = torch.as_tensor(input_ids, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    waiting = Waiting(streamer, seed, ids.device)
    config = options.get("generation_config") or model.generation_config
    if (options.get("num_beams") or config.num_beams or 1) > 1:
        raise ConfigError("a batch takes greedy decoding and sampling: call generate itself for beam search")
    is_taken = model.generate(ids, streamer=waiting, **options) is waiting
    if not is_taken:
        raise ConfigError("a batch takes greedy decoding and sampling: call generate itself for other modes")
    return waiting


def stock_class(model: Any) -> Any:
    """The class that a model with an adapter had before."""
    return next(kind.__dict__[STOCK] for kind in type(model).__mro__ if STOCK in kind.__dict__)


def run_plain(model: Any, waiting: Waiting) -> Any:
    """Run a call that waited, by stock's own loop; what `generate` returns."""
    devices = [waiting.device] if waiting.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=waiting.seed is not None):
        if waiting.seed is not None:
            torch.manual_seed(waiting.seed)
        return stock_class(model)._sample(model, *waiting.given, **waiting.model_kwargs)
