"""The route that every path of the API is: nothing is read or done before the caller is known and the body is small."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lora_trainer.api.access import RefusedError, check_caller, check_origin
from lora_trainer.api.context import Context
from lora_trainer.errors import ConfigError, Problem, UserError, problems_of
from lora_trainer.files import disk_is_full
from lora_trainer.jobs.job import UnknownJobError, full_disk
from lora_trainer.workspace.sessions import UnknownSessionError

MAX_BODY = 4 << 20
"""Bytes of a request, uploads apart: the captions of some thousand pictures."""
MAX_UPLOAD = 96 << 20
"""Bytes of an upload: one large picture in base64, or many usual ones."""

log = logging.getLogger(__name__)


def guarded(context: Context, max_body: int = MAX_BODY) -> type[APIRoute]:
    """A route class that checks access, origin and size first, and turns every error into
    ``{message, field, remedy, problems}``."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def guarded_handle(request: Request) -> Response:
                try:
                    check_caller(request, context.host.access())
                    if request.method not in ("GET", "HEAD"):
                        check_origin(request)
                        request = await _read(request, max_body)
                    response = await handle(request)
                    response.headers["X-Content-Type-Options"] = "nosniff"
                    return response
                except ClientDisconnect:
                    return Response(status_code=499)  # the page was closed or reloaded; nobody reads this
                except RefusedError as error:
                    return _answer(context, error.status, [Problem(error.message, None, error.remedy)], error.headers)
                except UserError as error:
                    if error.__cause__ is not None and disk_is_full(error.__cause__):
                        return _answer(context, 507, [full_disk(context.manager.folders.data)])
                    status = 404 if isinstance(error, (UnknownJobError, UnknownSessionError)) else 400
                    return _answer(context, status, problems_of(error), summary=error)
                except RequestValidationError as error:
                    return _answer(context, 422, [_validation_problem(detail) for detail in error.errors()])
                except HTTPException as error:
                    return _answer(context, error.status_code, [Problem(str(error.detail))], dict(error.headers or {}))
                except UnicodeEncodeError:
                    problem = Problem("The text holds halves of characters.", None, "Send valid Unicode.")
                    return _answer(context, 400, [problem])
                except Exception as error:
                    # The host would show a bare "Internal Server Error"; a person should learn more.
                    log.exception("%s %s failed", request.method, request.url.path)
                    if disk_is_full(error):
                        return _answer(context, 507, [full_disk(context.manager.folders.data)])
                    problem = Problem(
                        f"Something unexpected happened: {type(error).__name__}: {error}",
                        None,
                        "The WebUI's console has the details.",
                    )
                    return _answer(context, 500, [problem])

            return guarded_handle

    return GuardedRoute


async def _read(request: Request, limit: int) -> Request:
    """The request with its body in memory. Raises RefusedError as soon as it is larger than ``limit``."""
    refused = RefusedError(413, f"The request is larger than {limit >> 20} MB.", "Send less at a time.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise refused
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refused

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return Request(request.scope, receive)


def _validation_problem(detail: Any) -> Problem:
    where = [str(part) for part in detail.get("loc", ()) if part not in ("body", "query", "path")]
    return Problem(f"{detail.get('msg', 'not valid')}.", ".".join(where) or None, "See the API's documentation.")


def _answer(
    context: Context,
    status: int,
    problems: list[Problem],
    headers: dict[str, str] | None = None,
    summary: UserError | None = None,
) -> JSONResponse:
    first = problems[0]
    message = summary.message if isinstance(summary, ConfigError) else first.message
    content = {
        "message": context.plain(message),
        "field": context.plain(first.field),
        "remedy": context.plain(first.remedy),
        "problems": [{key: context.plain(text) for key, text in problem.to_dict().items()} for problem in problems],
    }
    return JSONResponse(content, status, headers)
