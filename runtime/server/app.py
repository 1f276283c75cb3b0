"""The routes: OpenAI's, health, metrics and the page. Knows no process and no signals."""

import asyncio
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from runtime.errors import SpecBoundError
from runtime.server.gate import Gate
from runtime.server.limits import Limits, prompt_ids, token_limit
from runtime.server.metrics import Metrics
from runtime.server.response import Answer, as_api_error
from runtime.server.schema import ApiError, ChatRequest, CompletionRequest
from runtime.server.worker import Unavailable, Worker

# The page is one file and asks nobody but this server.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def make_app(worker: Worker, *, model_id: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The server's routes over a worker, which somebody else starts and stops.

    Args:
        model_id: the name the model is served under.
        api_key: what clients must send; None asks for none, and answers to local names only.
    """
    # No documentation routes: their page would load scripts from elsewhere.
    app = FastAPI(title="SpecBound", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(lambda: worker.state == "ready", lambda: worker.num_waiting)
    _add_error_forms(app)

    _add_looks(app, worker, metrics)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(model_id)]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_name(name, model_id)
        return _described(model_id)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await respond(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(body, request)

    async def respond(body: ChatRequest | CompletionRequest, request: Request) -> Response:
        _check_name(body.model, model_id)
        prompt = await run_in_threadpool(prompt_ids, worker, body)
        context = int(worker.model.config.max_position_embeddings)
        limit = token_limit(body, prompt.shape[1], context, limits)
        answer = Answer(body, worker, metrics, model_id, prompt, limit, limits.seconds)
        answer.submit()
        if body.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # for proxies that collect
            # A client may leave before the stream begins, whose own end then never comes.
            last = BackgroundTask(answer.cancel)
            return StreamingResponse(answer.stream(), 200, headers, "text/event-stream", last)
        return await _unless_gone(request, answer)

    app.add_middleware(Gate, api_key=api_key, max_body_bytes=limits.max_body_bytes)
    return app


def _add_looks(app: FastAPI, worker: Worker, metrics: Metrics) -> None:
    """The page, and what tells how the server is."""
    page = files("runtime.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    def health() -> JSONResponse:
        ready = worker.state == "ready"
        detail = {"certificate": str(worker.model.specbound.certificate)} if ready else {}
        return JSONResponse({"status": "ok" if ready else worker.state} | detail, 200 if ready else 503)

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")


async def _unless_gone(request: Request, answer: Answer) -> Response:
    """The whole answer; where the client leaves before, the call is cancelled."""
    whole = asyncio.create_task(answer.whole())
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if whole.done():
            return JSONResponse(whole.result())
        return Response(status_code=499)  # nobody reads it
    finally:
        answer.cancel()
        whole.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _described(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "specbound"}


def _check_name(name: str, model_id: str) -> None:
    if name != model_id:
        raise ApiError(404, f"this server serves {model_id!r} only", code="model_not_found", param="model")


def _add_error_forms(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: SpecBoundError) -> JSONResponse:
        return answer(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        path = [] if first["type"] == "json_invalid" else first["loc"][1:]
        place = ".".join(str(part) for part in path)
        return answer(ApiError(400, f"{place or 'body'}: {first['msg']}", param=place or None))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(as_api_error(error))
