"""Traces of random numbers, and what the parts of a round cost, for the tests of replay."""

import numpy as np

from train.calibration.traces import Traces
from train.replay.costs import CostTable

EXITS, NUM_LAYERS = (0, 2, 3, 5), 6
WIDTHS = range(1, 10)
DRAFTS = 3  # kinds of drafts in a round: the first, the second, any other
FOLLOWED = 4  # drafts of the lookup behind a wrong one of its own
COSTS = CostTable(
    num_hidden_layers=NUM_LAYERS,
    layer={width: 1.0 + 0.4 * (width - 1) for width in WIDTHS},
    layer_context={width: 0.001 * width for width in WIDTHS},
    unembedding={width: 1.5 + 0.1 * width for width in WIDTHS},
    head=0.25,
    lookup=0.03,
    token=0.2,
    round=0.3,
    plain=9.0,
    plain_context=0.002,
)


def random_traces(lengths: tuple[int, ...], seed: int = 0, prompt: int = 7) -> Traces:
    numbers = np.random.default_rng(seed)
    total = sum(lengths)
    return Traces(
        layers=EXITS,
        confidence=numbers.random((len(EXITS), DRAFTS, total), dtype=np.float32),
        correct=numbers.random((len(EXITS), DRAFTS, total)) < 0.7,
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        context=np.concatenate([prompt + np.arange(length) for length in lengths]),
        after_wrong=numbers.random((FOLLOWED, total), dtype=np.float32),
    )
