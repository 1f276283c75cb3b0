"""`Tally`: counts requests that were refused before they got a place in the queue. Plain ASGI; knows no models."""

from collections.abc import MutableMapping
from typing import Any

from runtime.server.gate import App, Receive, Scope, Send
from runtime.server.metrics import Metrics

# In a request's state: it has its place, and its answer counts it.
ADMITTED = "admitted"


class Tally:
    """Stands before the gate, so that what the gate refuses counts too."""

    def __init__(self, app: App, *, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, and look at the status of what comes back."""
        if scope.get("method") != "POST" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def watch(message: MutableMapping[str, Any]) -> None:
            if message.get("status", 200) >= 400 and not state.get(ADMITTED):
                self.metrics.requests.labels("refused").inc()
            await send(message)

        await self.app(scope, receive, watch)
