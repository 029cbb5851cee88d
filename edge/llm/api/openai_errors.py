"""Errors as OpenAI's API tells them: a status and {"error": {"message", "type", "param", "code"}}.

Owns which error of fedge has which status and code. Must never show a path of this machine or a stack trace.
"""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from fedge.core.errors import AddressError, FedgeError, ModelError, Overloaded, RankLost, TheirFault, TooLate

log = logging.getLogger("fedge")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_AFTER = {"Retry-After": "1"}  # seconds


class ApiError(Exception):
    """One request is refused, or has failed. It never leaves the server but as `body`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's form, to be written as JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The error as a whole answer."""
        return Response(msgspec.json.encode(self.body()), self.status, self.headers, "application/json")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def failed(cause: type[Exception] | None) -> ApiError:
    """What a client is told of a request that failed on its way. Sentences may name folders, so the kind is all."""
    if cause is not None and issubclass(cause, AddressError | RankLost):
        sentence = "The devices that are there cannot hold the model, or cannot be reached; ask again later."
        return ApiError(503, sentence, code="unavailable", headers=RETRY_AFTER)
    return ApiError(500, "The model failed; ask again, or see the server's log.", code="model_failed")


def told(error: Exception) -> ApiError:
    """What a user is told of any error. What is nobody's input is logged, and only its kind is named."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelError):  # its sentences name folders
        log.warning("A request cannot be answered: %s", error)
        return bad("This model has no chat template that works for these messages; use /v1/completions.", "messages")
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=RETRY_AFTER)
    if isinstance(error, TooLate):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, AddressError | RankLost):
        return ApiError(503, str(error), code="unavailable", headers=RETRY_AFTER)
    if isinstance(error, TheirFault):
        return bad(str(error))
    log.error("A request failed", exc_info=error)
    known = str(error) if isinstance(error, FedgeError) else f"The server failed ({type(error).__name__}); try again."
    return ApiError(500, known, code="internal_error")
