"""The route that every path of the API is: nothing is read or done before the caller is known and the body is small."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lora_trainer.api import PREFIX
from lora_trainer.api.access import RefusedError, check_caller, check_host, check_origin
from lora_trainer.api.context import Context
from lora_trainer.errors import ConfigError, Problem, UserError, has_half_characters, problems_of
from lora_trainer.files import disk_is_full
from lora_trainer.jobs.job import UnknownJobError, full_disk
from lora_trainer.planning.estimate import NobodyWaitsError
from lora_trainer.workspace.sessions import UnknownSessionError

MAX_BODY = 4 << 20
"""Bytes of a request, uploads apart: the captions of some thousand pictures."""
MAX_UPLOAD = 96 << 20
"""Bytes of an upload: one large picture in base64, or many usual ones."""
MAX_READ_AWAY = 512 << 20
READ_AWAY_SECONDS = 30.0
"""How much of a refused request is read, and for how long, before the connection is closed over it."""

_ALL_READ = "lora_trainer.all_read"
# In JSON: one of a pair of surrogates or a lone one, escaped or in bytes; or UTF-16.
_PERHAPS_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


def new_router(context: Context, part: str, max_body: int = MAX_BODY) -> APIRouter:
    """A router of guarded routes under ``PREFIX``. Its routes are put into an app as they are: FastAPI's include_router
    makes each a second time, which takes A1111's release of it a second at every start."""
    return APIRouter(prefix=PREFIX, route_class=guarded(context, max_body), tags=[f"LoRA trainer: {part}"])


def guarded(context: Context, max_body: int = MAX_BODY) -> type[APIRoute]:
    """A route class that checks access, origin and size first, and turns every error into
    ``{message, field, remedy, problems}``."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def guarded_handle(request: Request) -> Response:
                try:
                    check_host(request, context.host.access())
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
                    await _read_away(request)
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
    """The request with its body in memory. Raises RefusedError as soon as it is larger than ``limit``, and for JSON
    with text that could be neither stored nor sent again."""
    refused = RefusedError(413, f"The request is larger than {limit >> 20} MB.", "Send less at a time.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise refused
    body = bytearray()
    async for chunk in _chunks(request):
        body += chunk
        if len(body) > limit:
            raise refused
    if _PERHAPS_HALF.search(body) and await run_in_threadpool(_has_half_characters, bytes(body)):
        raise RefusedError(400, "The text holds halves of characters.", "Send valid Unicode.")

    whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def receive() -> Any:
        return whole.pop() if whole else await request.receive()  # then, that the caller has gone

    return Request(request.scope, receive)


async def while_asked(request: Request, work: Callable[[Callable[[], bool]], Answer]) -> Answer:
    """``work`` in a thread; what it is given says whether the caller has gone meanwhile."""
    gone = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    watcher = asyncio.create_task(watch())
    try:
        return await run_in_threadpool(work, gone.is_set)
    except NobodyWaitsError:
        raise ClientDisconnect from None
    finally:
        watcher.cancel()


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes; what is left of it can be asked for again."""
    while not request.scope.get(_ALL_READ):
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        request.scope[_ALL_READ] = not message.get("more_body", False)
        yield message.get("body", b"")


async def _read_away(request: Request) -> None:
    """Read what is left of a refused request: who still sends sees the answer then, and not a broken connection."""
    if request.method in ("GET", "HEAD") or request.headers.get("expect", "").lower() == "100-continue":
        return  # nothing comes, or not before it is asked for
    left = MAX_READ_AWAY
    with anyio.move_on_after(READ_AWAY_SECONDS):
        async for chunk in _chunks(request):
            left -= len(chunk)
            if left < 0:
                return


def _has_half_characters(body: bytes) -> bool:
    """Whether a text in this JSON holds a lone surrogate."""
    try:
        pending = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # said by whoever reads it as JSON
    while pending:
        value = pending.pop()
        if isinstance(value, str) and has_half_characters(value):
            return True
        pending += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return False


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
