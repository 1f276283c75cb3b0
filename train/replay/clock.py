"""`Clock`: when each token of a `generate` call came. Knows no model and no figures."""

import time

import torch
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer that notes times.

    Attributes:
        times: `time.perf_counter` at the prompt, then at each token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then token after token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing."""
