"""Traces of the user's own workload: the base answers the prompts, and every source is asked at every position.

The adapter's bounds affect only how fast the answers are generated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runtime.decoding.drafter import HeadDrafter
from runtime.drafting.exit_head import PROMPT_TOKENS
from runtime.errors import ConfigError
from train.calibration.exit_log import ExitLog
from train.calibration.lookup_traces import LookupTraces
from train.calibration.temperatures import require_positions
from train.calibration.traces import Traces
from train.features.extractor import FeatureExtractor


def log_workload(model: Any, prompts: Sequence[Tensor], *, max_new_tokens: int) -> Traces:
    """Generate the base's own greedy answers and trace them.

    Args:
        model: as `load_specbound` returns it.
        prompts: token ids, each of shape [1, T], int64.

    Raises:
        DataError: the answers are too short.
        ConfigError: the model drafts with something other than an adapter's heads.
    """
    rows = []
    for prompt in tqdm(prompts, "answer", unit="prompt"):
        text = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)[0].tolist()
        rows.append((text[: prompt.shape[1]], text[prompt.shape[1] :]))
    require_positions(sum(len(response) for _, response in rows))
    return log_texts(model, rows)


@torch.no_grad()
def log_texts(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Traces:
    """Trace texts that the base itself generated.

    Args:
        model: as `load_specbound` returns it.
        rows: (prompt ids, response ids) of each.

    Raises:
        ConfigError: the model drafts with something other than an adapter's heads.
    """
    drafter, layers = model.specbound.drafter, model.specbound.prepared.layers
    if not isinstance(drafter, HeadDrafter):
        raise ConfigError("traces need an adapter's heads: load the model with load_specbound")
    exits = drafter.heads.exit_layers
    kept = PROMPT_TOKENS if drafter.heads.attends else 0
    extract = FeatureExtractor(layers, exits, top_k=1, prompt_tokens=kept)
    features = (extract([row]) for row in tqdm(rows, "trace", unit="text"))
    log = ExitLog.collect(
        features,
        drafter.heads,
        temperatures=drafter.temperatures.temperatures,
        ages=drafter.heads.exits.one.ages,
    )
    lookup = None
    if drafter.lookup is not None:
        lookup = LookupTraces.collect(rows, log.targets.tolist()), drafter.lookup
    return Traces.of(rows, log, lookup)
