"""SIGINT and SIGTERM during a fit: the current step is finished and saved. Knows nothing of steps or files."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class StopSignals:
    """Within `with`: the first signal that asks the process to stop is kept in `received`.

    Outside `waiting()` it also ends the process at once, by SystemExit with the shell's code for it: 130 after
    Ctrl-C, 143 after SIGTERM. Later ones change nothing while the process waits: a launcher sends its own after the
    terminal's. Only the main thread can have handlers; elsewhere signals do what they did.
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
        """While a fit runs that looks at `received` after every step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.received:  # after the last look at it
            raise SystemExit(exit_code(self.received))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            when = "after this step" if self._waits else "here; run again to go on"
            logger.warning("%s: the fit ends %s", signal.Signals(number).name, when)
        self.received = self.received or number
        if not self._waits:
            raise SystemExit(exit_code(self.received))


def exit_code(number: int) -> int:
    """The code that a shell reports for a process ended by this signal."""
    return 128 + number
