"""`Speed`: how fast a fit goes, how much memory it takes, and how long it still needs. Knows no losses."""

import resource
import sys
import time

import torch

from train.fitting.flops import FitFlops, peak_flops
from train.fitting.schedule import StepText


class Speed:
    """A clock over the steps of one process and the figures that follow from it.

    Args:
        flops: of the base and the heads.
        lengths: prompt and response tokens of each sequence of the fit split.
        device: of this process.
    """

    def __init__(self, flops: FitFlops, lengths: list[tuple[int, int]], device: torch.device) -> None:
        self.flops, self.lengths, self.device = flops, lengths, device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.started = self.last = time.perf_counter()
        self.steps = 0

    def cost(self) -> float:
        """Operations of the fit over those of the base's forward alone, on the whole split."""
        base, heads = self._count(range(len(self.lengths)))
        return (base + heads) / base

    def step(self, text: StepText, *, left: int, cached: bool) -> dict[str, float]:
        """Figures of the step that has just ended.

        Args:
            text: what this process saw in it.
            left: steps still to do.
            cached: features were read, so that the base did not run.
        """
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.steps += 1
        base, heads = self._count([index for batch in text.batches for index in batch])
        values = {
            "speed/tokens_per_second": text.num_positions / seconds,
            "speed/peak_memory_gib": peak_memory(self.device) / 2**30,
            "speed/seconds_left": left * (now - self.started) / self.steps,
        }
        if self.peak is not None:
            values["speed/mfu"] = (heads + (0 if cached else base)) / seconds / self.peak
        return values

    def line(self, values: dict[str, float]) -> str:
        """The figures of a step for the bar."""
        mfu = f", MFU {values['speed/mfu']:.0%}" if "speed/mfu" in values else ""
        return (
            f"{values['speed/tokens_per_second']:.0f} tokens/s, {values['speed/peak_memory_gib']:.1f} GiB{mfu}, "
            f"{_shown(values['speed/seconds_left'])} left"
        )

    def pause(self) -> None:
        """Leave out the time since the last step: it went to figures or to a checkpoint."""
        now = time.perf_counter()
        self.started += now - self.last
        self.last = now

    def _count(self, sequences: list[int] | range) -> tuple[int, int]:
        chosen = [self.lengths[index] for index in sequences]
        tokens, positions = sum(sum(pair) for pair in chosen), sum(response for _, response in chosen)
        pairs = sum(sum(pair) * (sum(pair) + 1) // 2 for pair in chosen)
        return self.flops.base(tokens, positions, pairs), self.flops.heads(positions)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _shown(seconds: float) -> str:
    """A time to go: `2 h 05 min`, `7 min` or `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 120 else f"{seconds:.0f} s"
