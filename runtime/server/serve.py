"""`serve`: the process: runs until a signal, lets the running requests finish. Knows no routes."""

import os
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.server.app import make_app
from runtime.server.request.limits import Limits
from runtime.server.worker import Worker

# For a thread that was told to end to do so.
STOP_SECONDS = 5.0


def serve(
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    listener: socket.socket,
    *,
    names: Sequence[str],
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    limits: Limits | None = None,
    kv_bytes: int | None = None,
    grace: float = 30.0,
) -> None:
    """Serve one model until SIGTERM or SIGINT; those that run then have `grace` seconds to finish.

    Args:
        load: makes the model and its tokenizer, in the thread that will run it, while /health says 503.
        listener: of `bind`; closed by its owner.
        names, api_keys, cors_origins: as `make_app` takes them.
        kv_bytes: as `Worker` takes it.

    Raises:
        SpecBoundError: and whatever else `load` raises.
        KeyboardInterrupt: it was SIGINT.
    """
    limits, interrupted = limits or Limits(), False
    worker = Worker(
        load, max_waiting=limits.max_waiting, max_running=limits.max_running, kv_bytes=kv_bytes,
        on_change=lambda: server.on_change(),
    )  # fmt: skip
    app = make_app(worker, names=names, limits=limits, api_keys=api_keys, cors_origins=cors_origins)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(grace)),
        server_header=False, lifespan="off",
    )  # fmt: skip
    server = _Server(config, worker)
    # uvicorn raises the signal that ended it once more when all is done: SIGTERM is then a clean end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    worker.start()
    try:
        server.run([listener])
    except KeyboardInterrupt:
        interrupted = True
    # Who tells it again is not heard: the thread would meet the interpreter's end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped = worker.stop(timeout=STOP_SECONDS)
    if not stopped:  # still loading, or deep in a prompt: a thread in torch must not meet the interpreter's end
        os._exit(130 if interrupted else 0)
    if worker.error is not None:
        raise worker.error
    if interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """uvicorn that tells the worker when it stops, and stops when the worker fails."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def on_change(self) -> None:
        """The worker's state changed."""
        if self.worker.state == "failed":
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, then let what runs finish."""
        self.worker.drain()
        await super().shutdown(sockets)
