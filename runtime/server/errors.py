"""`ApiError`: an error in OpenAI's form, and what of other errors a client is told. Knows no routes."""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from runtime.batch.memory import TooLong
from runtime.errors import SpecBoundError
from runtime.server.request.strict import TOO_DEEP
from runtime.server.worker import Full, Unavailable

# What the document says of every error.
TEXT, MAYBE = {"type": "string"}, {"type": ["string", "null"]}
FIELDS = {"message": TEXT, "type": TEXT, "param": MAYBE, "code": MAYBE}
PROBLEM = {"type": "object", "properties": FIELDS, "required": [*FIELDS]}
PROBLEMS = {"type": "object", "properties": {"error": PROBLEM}, "required": ["error"]}


# Of what pydantic says, in plain words.
WORDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "this server does not know this field: leave it out",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "missing": "is missing: give it",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_type": "must be text",
}


class ApiError(Exception):
    """An error as OpenAI's clients read it.

    Args:
        status: of HTTP.
        headers: what goes beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def body(self) -> dict[str, Any]:
        """What the response holds."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of it: nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, TooLong):
        return ApiError(400, str(error), code="context_length_exceeded", param="max_tokens")
    return ApiError(500, f"the request failed ({type(error).__name__})", code="failed")


def add_error_forms(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(Full)
    @app.exception_handler(TooLong)
    @app.exception_handler(Unavailable)
    async def not_taken(request: Request, error: SpecBoundError) -> JSONResponse:
        return answer(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(first_of(error.errors(), ("body",)))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {error.detail}"
        if isinstance(error.__cause__, RecursionError):  # of the JSON reader
            said = f"body: {TOO_DEEP}"
        return answer(ApiError(error.status_code, said, headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(as_api_error(error))


def first_of(errors: Sequence[Any], above: tuple[str, ...]) -> ApiError:
    """The first thing that is wrong with a body, in a sentence that begins with its place.

    Args:
        errors: of pydantic.
        above: what stands before each place.
    """
    first = errors[0]
    path = [] if first["type"] == "json_invalid" else first["loc"][len(above) :]
    place = ".".join(str(part) for part in path)
    said = WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        said = f"must be {first['ctx']['expected']}".replace("'", "")
    said = re.sub(r"^\w+ should ", "must ", said)
    return ApiError(400, f"{place or 'body'}: {said}", param=place or None)
