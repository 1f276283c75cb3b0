"""`Clock`: when each token of a `generate` call arrived."""

import time

import torch
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """A streamer that records times.

    Attributes:
        times: `time.perf_counter` at the prompt, then at each token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time; called for the prompt and then for each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""
