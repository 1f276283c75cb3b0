"""A server of a tiny model in this process, for the tests that talk to it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from runtime.server.app import make_app
from runtime.server.limits import Limits
from runtime.server.worker import Worker

MODEL_ID = "tiny"


@contextmanager
def running(load: Callable[[], tuple[Any, Any]], *, wait: bool = True, **options: Any) -> Iterator[tuple[str, Worker]]:
    """Its address and its worker, once the model is loaded; both are stopped afterwards.

    Args:
        options: of `make_app`.
    """
    limits = options.setdefault("limits", Limits())
    worker = Worker(load, max_waiting=limits.max_waiting)
    app = make_app(worker, model_id=MODEL_ID, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        worker.start()
        thread.start()
        until(lambda: server.started and (not wait or worker.state == "ready"))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", worker
        finally:
            server.should_exit = True
            thread.join(20)
            assert worker.stop(20) and not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until it holds; on a machine that does nothing else this is over at once."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
