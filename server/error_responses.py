"""Errors as responses of the app: ours, those of its routes, and what nobody expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rae.server.errors import ApiError, Detail, error_body
from rae.server.limits import clean


def error_response(
    request: Request,
    status: int,
    kind: str,
    message: str,
    *,
    headers: Mapping[str, str] | None = None,
    details: Sequence[Detail] = (),
) -> JSONResponse:
    request_id = request.scope["state"]["request_id"]
    headers = {"x-request-id": request_id, **(headers or {})}
    return JSONResponse(error_body(kind, message, request_id, details), status, headers)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    request.scope["state"]["failure"] = error.reason
    return error_response(
        request,
        error.status,
        error.type,
        str(error),
        headers=error.headers,
        details=error.details,
    )


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path, method = clean(request.scope["path"]), request.method
    kind, message = {
        404: ("not_found", f"no such path: {path}; GET /docs lists them"),
        405: ("method_not_allowed", f"{method} is not allowed for {path}"),
    }.get(error.status_code, ("http_error", str(error.detail)))
    return error_response(request, error.status_code, kind, message, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    message = f"the server failed ({type(error).__name__}); its log says where"
    return error_response(request, 500, "internal_error", message)


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
