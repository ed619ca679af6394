"""What goes wrong, as each API says it: one line, and a status."""

from __future__ import annotations

import logging
import math

from starlette.responses import JSONResponse, Response

from refimpl.loading.memory import MemoryRefusal
from refimpl.model.cache import ContextFull
from refimpl.serve.scheduler import Busy

log = logging.getLogger("refimpl.serve")

ANTHROPIC = "/v1/messages"
"""Paths that begin so have Anthropic's form, all others OpenAI's."""
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
                   413: "request_too_large", 503: "overloaded_error"}


class ApiError(Exception):
    """A refusal. `param` is the field that is to blame, `code` a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}


def bad(param: str, message: str) -> ApiError:
    """400 because of the field `param`, which the message is about: "n must be ..."."""
    return ApiError(400, message, param)


def explained(error: Exception) -> ApiError:
    """The answer to any exception. One that nobody expected is logged."""
    if isinstance(error, ApiError):
        return error
    line = " ".join(str(error).split())[:500]
    if isinstance(error, Busy):
        return ApiError(503, line, code="busy", headers={"Retry-After": str(math.ceil(error.retry_after))})
    if isinstance(error, ContextFull):
        return ApiError(400, line, code="context_length_exceeded")
    if isinstance(error, MemoryRefusal | ValueError):
        return ApiError(400, line)
    log.error("unexpected error", exc_info=error)
    return ApiError(500, f"internal error: {type(error).__name__}: {line}", code="internal_error")


def form(path: str, error: ApiError) -> dict[str, object]:
    """The JSON of an error, in the form of the API that `path` belongs to."""
    if path.startswith(ANTHROPIC):
        kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    kind = OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def response(path: str, error: ApiError) -> Response:
    """The response to a request that is refused."""
    return JSONResponse(form(path, error), error.status, error.headers)
