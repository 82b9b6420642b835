"""What every request passes before and after its route: who may ask, how much and how slowly; and headers of every response."""

import asyncio
import contextlib
import hmac
import logging
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.api_errors import ClientGone, RequestError
from demo.api_metrics import Metrics
from demo.api_settings import Settings

logger = logging.getLogger("orthus.api")
PATHS = ("/health", "/metrics")
PREFIX = "/v1/"
GRACE = 30.0  # seconds beyond `max_seconds`, in which a route ends by itself
DRAIN_SECONDS = 2.0
FOR_ALL = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
FOR_DATA = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FOR_PAGES = {"Content-Security-Policy": "frame-ancestors 'none'", "X-Frame-Options": "DENY"}
ONCE = ("host", "origin", "content-type", "content-length")  # of two of them servers and frameworks see different ones


class SlowClient(Exception):
    """The client does not take what it is sent."""


def is_api(path: str) -> bool:
    return path in PATHS or path.startswith(PREFIX)


def path_of(scope: Scope) -> str:
    """The path that routes see: without the prefix that a proxy adds."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


class Guard:
    """ASGI middleware. Paths that are not the API's (an app mounted beside it) get headers and nothing else.

    Whatever fails inside is answered in OpenAI's shape and logged by its place in the code, without its message, which could
    hold what a user wrote.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self.settings)
        if not exchange.is_api:
            await self.app(scope, receive, exchange.send)
            return
        started = time.monotonic()
        try:
            await self._answer(scope, exchange)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.observe(route, exchange.status, time.monotonic() - started)

    async def _answer(self, scope: Scope, exchange: "Exchange") -> None:
        try:
            check_request(scope, self.settings)
            await asyncio.wait_for(self.app(scope, exchange.receive, exchange.send), self.settings.max_seconds + GRACE)
        except RequestError as error:
            await exchange.refuse(error)
        except (ClientGone, SlowClient):
            return  # with a response that is not whole, which makes the server close the connection
        except asyncio.TimeoutError:
            await exchange.refuse(RequestError(504, "the request took longer than the server allows", code="timeout"))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = type(error).__name__
            logger.error("%s in %s:%s, %s %s", kind, frame.filename, frame.lineno, scope["method"], path_of(scope))
            await exchange.refuse(RequestError(500, "the server failed on this request", code="internal_error"))


def check_request(scope: Scope, settings: Settings) -> None:
    """From the headers alone. Raises `RequestError` 400, 401, 403, 411 or 413."""
    headers = Headers(scope=scope)
    check_source(headers, settings)
    if settings.token is not None and path_of(scope) != "/health":
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_known = hmac.compare_digest(given.strip().encode("utf-8", "replace"), settings.token.encode())
        if scheme.lower() != "bearer" or not is_known:
            authenticate = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "send Authorization: Bearer with a valid token", code="invalid_api_key", headers=authenticate)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "compressed bodies are not accepted", code="unsupported_encoding")
    check_length(headers, settings.max_body_bytes)


def check_source(headers: Headers, settings: Settings, *, is_link: bool = False) -> None:
    """Raises `RequestError` 400 for repeated headers, 403 for another `Host` and for calls from pages of other sites.

    is_link: a page that may be opened by a link of another site.
    """
    for name in ONCE:
        if len(headers.getlist(name)) > 1:
            raise RequestError(400, f"the header {name} occurs twice", code="repeated_header")
    host = headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if settings.allowed_hosts and name.lower() not in settings.allowed_hosts:
        raise RequestError(403, "this Host is not served here", code="host_not_allowed")
    is_foreign = "origin" in headers and urlsplit(headers["origin"]).netloc != host
    if is_foreign or not (is_link or headers.get("sec-fetch-site", "none") in ("none", "same-origin")):
        raise RequestError(403, "pages of other sites may not call this server", code="cross_site")


def check_length(headers: Headers, max_bytes: int) -> None:
    """Raises `RequestError` 400 for a Content-Length that is no number, 413 for one above `max_bytes`."""
    length = headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 19):
        raise RequestError(400, "Content-Length is not a number", code="invalid_length")
    if length is not None and int(length) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(413, f"the body exceeds {max_bytes} bytes", code="body_too_large")


class Exchange:
    """`receive` and `send` of one request with their limits."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings, max_bytes: int | None = None) -> None:
        self.max_bytes = settings.max_body_bytes if max_bytes is None else max_bytes
        self.is_api = is_api(path_of(scope))
        self._receive, self._send, self.settings = receive, send, settings
        self.status = 0  # 0 until the response has begun
        self.num_bytes = 0
        self.is_read = self.is_late = False  # the body has arrived; it did not in time
        self._deadline = asyncio.get_running_loop().time() + settings.body_seconds

    async def receive(self) -> Message:
        """Raises `RequestError` 408 for a body that comes too slowly, 413 for one that is too long."""
        if self.is_read:
            return await self._receive()  # waits for the client to hang up
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            self.is_late = True
            raise RequestError(408, "the body did not arrive in time", code="request_timeout") from None
        self.num_bytes += len(message.get("body", b""))
        self.is_read = not message.get("more_body", False)
        if self.num_bytes > self.max_bytes:
            raise _too_large(self.max_bytes)
        return message

    async def send(self, message: Message) -> None:
        """Raises `SlowClient` where nobody takes it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            kind = headers.get("content-type", "")
            is_data = self.is_api or kind.startswith("application/json")
            more = FOR_DATA if is_data else FOR_PAGES if kind.startswith("text/html") else {}
            for name, value in {**FOR_ALL, **more}.items():
                headers.setdefault(name, value)
        if not self.is_api:
            await self._send(message)
            return
        try:
            await asyncio.wait_for(self._send(message), self.settings.send_seconds)
        except asyncio.TimeoutError:
            raise SlowClient from None

    async def refuse(self, error: RequestError) -> None:
        """Answer with the error unless an answer has begun, after what is still on its way was read and thrown away."""
        if self.status:
            return
        response = error.response()
        if not self.is_read:
            response.headers["Connection"] = "close"
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drain(), 0 if self.is_late else DRAIN_SECONDS)
        await response({"type": "http", "method": "POST"}, self._receive, self.send)

    async def _drain(self) -> None:
        message: dict[str, Any] = {"more_body": True}
        while message.get("more_body", False):
            message = dict(await self._receive())
