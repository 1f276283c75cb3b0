"""`Gate`: what a request must pass before it is read: host, key, size. Plain ASGI; knows no routes but their names."""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from runtime.server.errors import ApiError
from runtime.server.listener import is_local

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What needs the key, where there is one; the page and /health tell nothing of anybody's.
GUARDED = ("/v1/", "/metrics", "/tokenize", "/detokenize")
TOO_LARGE = 413
ENCODED = 415
THROWN_AWAY = 1 << 20  # bytes of a body that is too large are read so far


class Gate:
    """Refuses in OpenAI's form.

    Args:
        api_keys: one of them is asked for as a bearer token. Without any only local names of this server are answered
            to, so that no web page can reach it under a name of its own.
        max_body_bytes: of a request.
    """

    def __init__(self, app: App, *, api_keys: Sequence[str], max_body_bytes: int) -> None:
        self.app = app
        self.api_keys = [key.encode() for key in api_keys]
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._refusal(scope["path"], {key.decode("latin-1"): value for key, value in scope["headers"]})
        body, cut = await self._read(receive)
        error = error or cut
        if error is not None:
            await refuse(error, send)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        if scope["method"] == "HEAD":  # the answer to GET, whose body the server leaves out
            scope = {**scope, "method": "GET"}

        async def replay() -> MutableMapping[str, Any]:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    def _refusal(self, path: str, headers: dict[str, bytes]) -> ApiError | None:
        if not self.api_keys:
            host = headers.get("host", b"").decode("latin-1")
            if not (is_local(host) or is_local(host.rpartition(":")[0])):
                return ApiError(403, "this server answers to local names only, unless it has an API key")
        elif path.startswith(GUARDED) and not self._has_key(headers.get("authorization", b"")):
            return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if int(headers.get("content-length", b"0")) > self.max_body_bytes:  # uvicorn lets only numbers through
            return self._too_large()
        if headers.get("content-encoding", b"").lower() not in (b"", b"identity"):
            return ApiError(ENCODED, "a Content-Encoding is not supported by this server: send the body as it is")
        return None

    def _has_key(self, given: bytes) -> bool:
        """Whether a key stands behind the scheme, in any case, and spaces; each is compared, found or not."""
        scheme, _, key = given.partition(b" ")
        found = [hmac.compare_digest(key.lstrip(b" "), known) for known in self.api_keys]
        return scheme.lower() == b"bearer" and any(found)

    def _too_large(self) -> ApiError:
        return ApiError(TOO_LARGE, f"the request is larger than {self.max_body_bytes} bytes, the most that is taken")

    async def _read(self, receive: Receive) -> tuple[bytes, ApiError | None]:
        """The whole body, which is small. What is too much is thrown away: to close on what was not read would reset
        the connection, and the client might never see the answer."""
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= self.max_body_bytes + THROWN_AWAY:
            message = await receive()
            if message["type"] != "http.request":
                return b"", ApiError(400, "the request was cut short")
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size <= self.max_body_bytes:
                parts.append(message.get("body", b""))
        return (b"", self._too_large()) if size > self.max_body_bytes else (b"".join(parts), None)


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with the error and close: the rest of the request is not read."""
    headers = {"content-type": "application/json", "connection": "close"} | error.headers
    raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
