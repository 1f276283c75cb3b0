"""`generate_batch`: transformers' own call for many prompts, run by our batch."""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.streamers import BaseStreamer

from runtime.batch.call import Call, generated
from runtime.batch.calls import MAX_REQUESTS, Batch
from runtime.errors import ConfigError, one_line


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    record_timestamps: bool = False,
    progress_bar: bool = False,
    persistent_manager: bool = False,
    warmup: bool = True,
    *,
    max_requests: int | None = None,
    seeds: Sequence[int] | None = None,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """Transformers' `generate_batch`, each request with the ids that `generate` gives it alone.

    Args:
        model: with an adapter.
        inputs: ids of each prompt.
        continuous_batching_config: its `max_requests_per_batch`, `seed` and `return_logprobs` are kept; its other
            fields size transformers' own cache and graphs, which are not used, and are taken without effect.
        record_timestamps: tell when each token was chosen, by `time.perf_counter`.
        progress_bar: show one.
        persistent_manager, warmup: of transformers' own manager and graphs; taken without effect.
        max_requests: requests that decode together, 8 if nothing else is said.
        seeds: one for each prompt: its ids are those that `generate` samples after `torch.manual_seed(seed)`; without
            any, seeds are drawn from the config's seed, or torch's random numbers. Further sequences of a prompt
            (`num_return_sequences`) have the seeds that follow.
        kwargs: as `generate` takes them.

    Returns:
        By name of request (`req_0`, ...; further sequences of a prompt end in `__child#0`, ...), in the order given:
        ids, and log-probabilities where the config's `return_logprobs`, or `output_scores` with
        `return_dict_in_generate`, ask for them.

    Raises:
        ConfigError: seeds and prompts differ in number.
    """
    if not inputs:
        return {}
    batching = continuous_batching_config
    config = generation_config or model.generation_config
    count = kwargs.pop("num_return_sequences", None) or config.num_return_sequences or 1
    if generation_config is not None:
        kwargs["generation_config"] = copy.deepcopy(generation_config)
        kwargs["generation_config"].num_return_sequences = 1
    elif (config.num_return_sequences or 1) > 1:
        kwargs["num_return_sequences"] = 1
    streamer = kwargs.pop("streamer", None)
    if getattr(batching, "return_logprobs", False):
        kwargs |= {"output_scores": True, "return_dict_in_generate": True}
    max_requests = max_requests or getattr(batching, "max_requests_per_batch", None) or MAX_REQUESTS
    seeds = _seeds(len(inputs), getattr(batching, "seed", None)) if seeds is None else seeds
    if len(seeds) != len(inputs):
        raise ConfigError(f"{len(seeds)} seeds for {len(inputs)} prompts: expected one for each prompt")
    calls: dict[str, Call] = {}
    clocks: dict[str, _Clock] = {}
    with Batch(model, max_requests) as batch, tqdm(total=len(inputs) * count, disable=not progress_bar) as bar:
        for number, (ids, seed) in enumerate(zip(inputs, seeds, strict=True)):
            mask = torch.ones(1, len(ids), dtype=torch.int64, device=model.device)
            for child in range(count):
                name = f"req_{number}" + (f"__child#{child - 1}" if child else "")
                own: dict[str, Any] = {"seed": seed + child, "attention_mask": mask}
                clocks[name] = _Clock(streamer)
                own["streamer"] = clocks[name] if record_timestamps else streamer
                calls[name] = batch.add(ids, **own, **kwargs)
        while not all(call.ended for call in calls.values()):
            bar.update(len(batch.round()))
    return {name: _as_output(name, call, clocks[name].times) for name, call in calls.items()}


class _Clock(BaseStreamer):
    """Notes when each token is told, and tells it to the call's own streamer.

    Attributes:
        times: by `time.perf_counter`; the first is the prompt's.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Told the prompt, then each token."""
        self.times.append(time.perf_counter())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """No more comes."""
        if self.streamer is not None:
            self.streamer.end()


def _seeds(count: int, seed: int | None) -> list[int]:
    """So many, from torch's random numbers or from a seed of their own."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2**31, (count,), generator=generator).tolist()
    return found


def _as_output(name: str, call: Call, times: list[float]) -> GenerationOutput:
    """What transformers returns of a request."""
    prompt = call.waiting.given[0][0].tolist()
    if call.error is not None:
        error, status = one_line(call.error), RequestStatus.FAILED
        return GenerationOutput(name, prompt, error=error, status=status, created_time=call.added)
    ids, scores = generated(call), getattr(call.output, "scores", None)
    pairs = zip(scores or (), ids, strict=scores is not None)
    chances = [float(row[0].log_softmax(-1)[token]) for row, token in pairs]
    found = GenerationOutput(name, prompt, ids, chances, status=RequestStatus.FINISHED, created_time=call.added)
    found.timestamps = times[1:] or None
    return found
