"""The routes: OpenAI's, health, metrics and the page. Knows no process and no signals."""

import asyncio
from collections.abc import Coroutine, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.background import BackgroundTask

from runtime.server.answer.answer import Answer, Form
from runtime.server.answer.chunks import Chunks
from runtime.server.answer.items import Items
from runtime.server.errors import PROBLEMS, ApiError, add_error_forms, first_of
from runtime.server.gate import Gate
from runtime.server.metrics import Metrics
from runtime.server.request.limits import Limits, check_ids
from runtime.server.request.prompts import detokenized, prompts_of, tokenized
from runtime.server.request.responses import ResponsesRequest
from runtime.server.request.schema import ChatRequest, CompletionRequest
from runtime.server.request.tokenize import DetokenizeRequest, TokenizeRequest
from runtime.server.tally import ADMITTED, Tally
from runtime.server.worker import Worker

# The page is one file and asks nobody but this server.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
# Of a client that left; nobody reads it.
GONE = 499
# What the document says of answers.
OBJECT = {"application/json": {"schema": {"type": "object"}}}
ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": OBJECT | {"text/event-stream": {}}}}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"content": OBJECT, "description": "Loading or stopping"}}


def make_app(
    worker: Worker,
    *,
    names: Sequence[str],
    limits: Limits,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """The server's routes over a worker, which somebody else starts and stops.

    Args:
        names: that the model is served under; answers tell the first.
        api_keys: one of them is what clients must send; without any it answers to local names only.
        cors_origins: web pages from there may ask too, as `https://example.org`; `*` is all of them.
    """
    # No documentation routes: their page would load scripts from elsewhere.
    app = FastAPI(
        title="SpecBound", docs_url=None, redoc_url=None,
        responses={"default": {"content": {"application/json": {"schema": PROBLEMS}}, "description": "An error"}},
    )  # fmt: skip
    metrics = Metrics(worker)
    worker.on_round = metrics.round
    add_error_forms(app)
    _add_looks(app, worker, metrics)
    _add_models(app, names)
    _add_tokenize(app, worker, names)
    _add_answers(app, worker, metrics, names, limits)

    # From the inside out: a preflight needs no key, and what is refused is counted.
    app.add_middleware(Gate, api_keys=api_keys, max_body_bytes=limits.max_body_bytes)
    app.add_middleware(Tally, metrics=metrics)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["Retry-After"],
        )  # fmt: skip
    return app


def _add_answers(app: FastAPI, worker: Worker, metrics: Metrics, names: Sequence[str], limits: Limits) -> None:
    """What is answered by the model, in the forms of OpenAI's three routes."""

    @app.post("/v1/chat/completions", responses=ANSWER)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await respond(body, request, Chunks(body, names[0]))

    @app.post("/v1/completions", responses=ANSWER)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(body, request, Chunks(body, names[0]))

    @app.post("/v1/responses", responses=ANSWER)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        try:
            chat = body.as_chat()
        except ValidationError as error:
            raise first_of(error.errors(), ()) from None
        return await respond(chat, request, Items(body, names[0]))

    async def respond(body: ChatRequest | CompletionRequest, request: Request, form: Form) -> Response:
        _check_name(body.model, names)
        prompts = await run_in_threadpool(prompts_of, worker, body)
        config = worker.model.config.get_text_config()
        limits.check_answers(len(prompts), body.n)
        check_ids(body, int(config.vocab_size))
        tokens = [_longest(body, prompt.num_tokens, limits, worker) for prompt in prompts]
        answer = Answer(body, worker, metrics, form, prompts, tokens, limits.seconds)
        answer.submit()
        setattr(request.state, ADMITTED, True)
        return await (_streamed(request, answer) if body.stream else _whole(request, answer))


def _add_tokenize(app: FastAPI, worker: Worker, names: Sequence[str]) -> None:
    """Prompts as token ids, and back."""

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        _check_name(body.model or names[0], names)
        return tokenized(worker, body)

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        _check_name(body.model or names[0], names)
        return {"prompt": detokenized(worker, body.tokens)}


def _add_models(app: FastAPI, names: Sequence[str]) -> None:
    """The one model, under each of its names."""

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_name(name, names)
        return _described(name)


def _add_looks(app: FastAPI, worker: Worker, metrics: Metrics) -> None:
    """The page, and what tells how the server is."""
    page = files("runtime.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health", responses=NOT_READY)
    def health() -> JSONResponse:
        ready = worker.state == "ready"
        detail: dict[str, Any] = {}
        if ready:
            detail = {"certificate": str(worker.model.specbound.certificate), "kv_tokens": worker.memory.tokens}
            detail["kv_blocks"] = worker.memory.blocks
            detail["max_running"] = worker.max_running
        return JSONResponse({"status": "ok" if ready else worker.state} | detail, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def show_metrics() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")


def _longest(body: ChatRequest | CompletionRequest, prompt_tokens: int, limits: Limits, worker: Worker) -> int:
    """Tokens to generate at most: what the context and the limits allow, and all KV blocks have room for."""
    most = limits.tokens(body, prompt_tokens, int(worker.model.config.get_text_config().max_position_embeddings))
    drafts = worker.model.specbound.bounds.max_draft_tokens
    return worker.memory.fit(prompt_tokens, most, drafts, shorten=body.limit is None)


async def _streamed(request: Request, answer: Answer) -> Response:
    """The answer as events, once the first is there: what fails before has a status of its own."""
    if not await _unless_gone(request, answer, answer.begin()):
        return Response(status_code=GONE)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # for proxies that collect
    # A client may leave before the stream begins, whose own end then never comes.
    return StreamingResponse(answer.stream(), 200, headers, "text/event-stream", BackgroundTask(answer.end))


async def _whole(request: Request, answer: Answer) -> Response:
    body = await _unless_gone(request, answer, answer.whole())
    return Response(status_code=GONE) if body is None else JSONResponse(body)


async def _unless_gone(request: Request, answer: Answer, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work comes to; None where the client leaves before, and the answer is ended."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    done = False
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        result = task.result() if task.done() else None
        done = task.done()
        return result
    finally:
        gone.cancel()
        if not done:
            task.cancel()
            answer.end()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _described(model_id: str) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "specbound"}


def _check_name(name: str, names: Sequence[str]) -> None:
    if name not in names:
        known = ", ".join(repr(one) for one in names)
        raise ApiError(404, f"this server serves {known} only", code="model_not_found", param="model")
