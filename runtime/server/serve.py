"""`serve`: the process: binds, runs until a signal, lets the running request finish. Knows no routes."""

import ipaddress
import os
import signal
import socket
from collections.abc import Callable

import uvicorn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.errors import ConfigError
from runtime.server.app import make_app
from runtime.server.limits import Limits
from runtime.server.worker import Worker

# For a thread that was told to end to do so.
STOP_SECONDS = 5.0


def serve(
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    *,
    model_id: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    grace: float = 30.0,
    on_bound: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve one model until SIGTERM or SIGINT; the request that runs then has `grace` seconds to finish.

    Args:
        load: makes the model and its tokenizer, in the thread that will run it, while /health says 503.
        api_key: what clients must send; needed where others can reach the host.
        on_bound: called with the server's address, before the model is loaded.

    Raises:
        ConfigError: the address cannot be had, or is public and there is no key.
        SpecBoundError: and whatever else `load` raises.
        KeyboardInterrupt: it was SIGINT.
    """
    if not (api_key or is_local(host)):
        raise ConfigError(f"{host} can be reached from other machines: set an API key, or bind 127.0.0.1")
    api_key, limits = api_key or None, limits or Limits()
    interrupted = False
    with _bound(host, port) as listener:
        worker = Worker(load, max_waiting=limits.max_waiting, on_change=lambda: server.on_change())
        app = make_app(worker, model_id=model_id, limits=limits, api_key=api_key)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(grace)),
            server_header=False, lifespan="off",
        )  # fmt: skip
        server = _Server(config, worker)
        name, bound = listener.getsockname()[:2]
        on_bound(f"http://{f'[{name}]' if ':' in name else name}:{bound}")
        # uvicorn raises the signal that ended it once more when all is done: SIGTERM is then a clean end.
        signal.signal(signal.SIGTERM, lambda *_: None)
        worker.start()
        try:
            server.run([listener])
        except KeyboardInterrupt:
            interrupted = True
        stopped = worker.stop(timeout=STOP_SECONDS)
    if not stopped:  # still loading, or deep in a prompt: a thread in torch must not meet the interpreter's end
        os._exit(130 if interrupted else 0)
    if worker.error is not None:
        raise worker.error
    if interrupted:
        raise KeyboardInterrupt


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket, had before a model is loaded for nothing."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"{host} port {port} cannot be bound: {error.strerror or error}") from None


def is_local(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
