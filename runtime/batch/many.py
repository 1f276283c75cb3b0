"""`generate_batch`: transformers' own call for many prompts, run by our batch."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from runtime.batch.call import Call, generated
from runtime.batch.calls import MAX_REQUESTS, Batch
from runtime.errors import ConfigError, one_line


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | None = None,
    *,
    max_requests: int = MAX_REQUESTS,
    seeds: Sequence[int] | None = None,
    progress_bar: bool = False,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """Transformers' `generate_batch`, each request with the ids that `generate` gives it alone.

    Args:
        model: with an adapter.
        inputs: ids of each prompt.
        max_requests: requests that decode together.
        seeds: one for each prompt: its ids are those that `generate` samples after `torch.manual_seed(seed)`; without
            any, seeds are drawn from torch's random numbers. Further sequences of a prompt (`num_return_sequences`)
            have the seeds that follow.
        kwargs: as `generate` takes them.

    Returns:
        By name of request (`req_0`, ...; further sequences of a prompt end in `__child#0`, ...), in the order given:
        ids, and log-probabilities where `output_scores` and `return_dict_in_generate` ask for scores.

    Raises:
        ConfigError: seeds and prompts differ in number.
    """
    config = generation_config or model.generation_config
    count = kwargs.pop("num_return_sequences", None) or config.num_return_sequences or 1
    if generation_config is not None:
        kwargs["generation_config"] = copy.deepcopy(generation_config)
        kwargs["generation_config"].num_return_sequences = 1
    elif (config.num_return_sequences or 1) > 1:
        kwargs["num_return_sequences"] = 1
    if seeds is None:
        seeds = torch.randint(2**31, (len(inputs),)).tolist()
    if len(seeds) != len(inputs):
        raise ConfigError(f"{len(seeds)} seeds for {len(inputs)} prompts: expected one for each prompt")
    calls: dict[str, Call] = {}
    with Batch(model, max_requests) as batch, tqdm(total=len(inputs) * count, disable=not progress_bar) as bar:
        for number, (ids, seed) in enumerate(zip(inputs, seeds, strict=True)):
            mask = torch.ones(1, len(ids), dtype=torch.int64, device=model.device)
            for child in range(count):
                name = f"req_{number}" + (f"__child#{child - 1}" if child else "")
                own = {"seed": seed + child, "attention_mask": mask}
                calls[name] = batch.add(ids, **own, **kwargs)
        while not all(call.ended for call in calls.values()):
            bar.update(len(batch.round()))
    return {name: _as_output(name, call) for name, call in calls.items()}


def _as_output(name: str, call: Call) -> GenerationOutput:
    """What transformers returns of a request."""
    prompt = call.waiting.given[0][0].tolist()
    if call.error is not None:
        return GenerationOutput(name, prompt, error=one_line(call.error), status=RequestStatus.FAILED)
    ids, scores = generated(call), getattr(call.output, "scores", None)
    pairs = zip(scores or (), ids, strict=scores is not None)
    chances = [float(row[0].log_softmax(-1)[token]) for row, token in pairs]
    return GenerationOutput(name, prompt, ids, chances, status=RequestStatus.FINISHED)
