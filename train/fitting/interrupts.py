"""`StopSignals`: on SIGINT or SIGTERM, a fit finishes and saves its current step before it ends."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class StopSignals:
    """A context that keeps the first signal asking the process to stop in `received`.

    Outside `waiting()` a signal also ends the process at once, by SystemExit with the shell's exit code: 130 after
    Ctrl-C, 143 after SIGTERM. Within `waiting()` later signals change nothing, because a launcher sends its own after
    the terminal's. Only the main thread can set handlers; in other threads nothing changes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._waits = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for a fit that checks `received` after every step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.received:  # after the last check
            raise SystemExit(exit_code(self.received))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            when = "after this step" if self._waits else "here; run again to continue"
            logger.warning("%s: the fit ends %s", signal.Signals(number).name, when)
        self.received = self.received or number
        if not self._waits:
            raise SystemExit(exit_code(self.received))


def exit_code(number: int) -> int:
    """The code that a shell reports for a process ended by this signal."""
    return 128 + number
