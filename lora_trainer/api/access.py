"""Who may call: the host leaves an extension's routes open, so credentials and origin are checked here."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request

from lora_trainer.host.base import AccessPolicy

_COOKIES = ("access-token", "access-token-unsecure")


class RefusedError(Exception):
    """A request that is not served. ``status``: the HTTP status; ``headers`` go with it."""

    def __init__(self, status: int, message: str, remedy: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.remedy, self.headers = status, message, remedy, headers or {}


def check_host(request: Request, policy: AccessPolicy) -> None:
    """Refuse a name that is not ours: a web page elsewhere can give its own name our address (DNS rebinding), and its
    requests then come from "the same origin".

    Such a page has no login, and a WebUI that listens to others is called by names that nobody here knows: both are
    let through.

    Raises:
        RefusedError: 403.
    """
    if policy.roots is not None or policy.api_credentials or _wants_login(request):
        return
    name = _host_name(request.headers.get("host", ""))
    if name == "localhost" or name.endswith(".localhost") or _is_address(name):
        return
    if name not in {known.strip().lower().rstrip(".") for known in policy.names}:
        raise RefusedError(
            403, f"This WebUI does not know itself as {name[:100]!r}.",
            "Open it as localhost, or enter the name on the settings page under LoRA trainer.",
        )  # fmt: skip


def _host_name(host: str) -> str:
    """The name or address in a Host header, without the port."""
    try:
        parts = urlsplit(f"//{host.strip()}")
        _ = parts.port  # raises where what follows the colon is no port
        return (parts.hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def check_caller(request: Request, policy: AccessPolicy) -> None:
    """Let in who has the API's credentials (HTTP Basic) or is logged in to the WebUI; everybody where neither is set.

    Raises:
        RefusedError: 401.
    """
    wants_login = _wants_login(request)
    if not policy.api_credentials and not wants_login:
        return
    if policy.api_credentials and _has_credentials(request, policy.api_credentials):
        return
    if wants_login and _is_logged_in(request):
        return
    raise RefusedError(
        401,
        "This needs a login.",
        "Log in to the WebUI, or send the user and password of --api-auth.",
        {"WWW-Authenticate": "Basic"} if policy.api_credentials else {},
    )


def check_origin(request: Request) -> None:
    """Refuse what another web page makes a browser send: state is changed by JSON from our own pages and scripts only.

    Raises:
        RefusedError: 403 for another origin, 415 for another content type.
    """
    origin = request.headers.get("origin")
    foreign = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if foreign or (origin is not None and not _is_own(origin, request)):
        raise RefusedError(403, "This request comes from another web page.", "Use the WebUI's own address.")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RefusedError(415, "Only JSON is accepted.", "Send it with Content-Type: application/json.")


def _is_own(origin: str, request: Request) -> bool:
    if request.headers.get("sec-fetch-site") == "same-origin":
        return True  # said by the browser itself; a proxy in between may have changed the Host
    try:
        host = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    own = {request.headers.get(name, "").lower() for name in ("host", "x-forwarded-host")} - {""}
    return host in own


def _has_credentials(request: Request, credentials: dict[str, str]) -> bool:
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        return False
    # Every pair is compared to its end, so that the time says nothing about users or passwords.
    matches = [_equal(user, name) & _equal(password, secret) for name, secret in credentials.items()]
    return bool(colon) and any(matches)


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8"), expected.encode("utf-8"))


def _wants_login(request: Request) -> bool:
    return getattr(request.app, "auth", None) is not None or _auth_dependency(request) is not None


def _auth_dependency(request: Request) -> Any:
    return getattr(request.app, "auth_dependency", None)


def _is_logged_in(request: Request) -> bool:
    """As gradio itself decides (routes.py, get_current_user): 4.x adds an id of the app to the cookies' names."""
    dependency = _auth_dependency(request)
    if dependency is not None:
        return dependency(request) is not None
    cookie_id = getattr(request.app, "cookie_id", None)
    names = _COOKIES if cookie_id is None else tuple(f"{name}-{cookie_id}" for name in _COOKIES)
    tokens = getattr(request.app, "tokens", {})
    token = next((value for name in names if (value := request.cookies.get(name))), None)
    return token is not None and tokens.get(token) is not None
