"""What the app accepts from outside: uploads, but no paths and no addresses.

Gradio fetches a file that a request names by its address, and where an app is mounted rather than launched it opens any path
that a request names. `AppGuard` refuses both before Gradio sees them. It reads every body whole and within its time, so that
Gradio never sees a request that breaks off.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.api_bodies import parse_json
from demo.api_errors import ClientGone, RequestError
from demo.api_guard import Exchange, check_length, check_source, is_api, path_of
from demo.api_settings import Settings
from demo.app_files import Folder, check_upload

MAX_BODY_BYTES = 1_000_000  # of a request that is no upload
MAX_UPLOAD_BYTES = 32_000_000  # of all files of one upload; each is limited by `Settings.max_image_bytes`
MAX_UPLOADS = 8  # held in memory at a time
MAX_OPEN = 128  # requests of one address at a time; an open page is one or two
HEARTBEAT_SECONDS = 0.5  # between two looks at whether the server stops
UPLOAD, LOGIN = "/gradio_api/upload", ("/login", "/login/")


class Refusal(RequestError):
    """A `RequestError` in the shape that Gradio's pages and clients read."""

    def body(self) -> dict[str, Any]:
        return {"detail": self.message}


class AppGuard:
    """ASGI middleware for the part of an application that is Gradio's.

    Args:
        folder: where Gradio stores uploads.
        settings: limits and `allowed_hosts` as the API has them.
        is_closing: whether the server was told to stop, so that pages which are only open must not hold it.
        is_known: whether a request comes from someone who gave the password, or there is none.
    """

    def __init__(
        self, app: ASGIApp, folder: Folder, settings: Settings, is_closing: Callable[[], bool],
        is_known: Callable[[Request], bool],
    ) -> None:  # fmt: skip
        self.app, self.folder, self.settings, self.is_closing, self.is_known = app, folder, settings, is_closing, is_known
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_api(path_of(scope)):
            await self.app(scope, receive, send)
            return
        is_upload = path_of(scope) == UPLOAD
        most = MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES
        exchange = Exchange(scope, receive, send, self.settings, most)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._counted((scope.get("client") or ("unknown",))[0], MAX_OPEN))
                self._check_head(scope, most)
                if is_upload:
                    stack.enter_context(self._counted(UPLOAD, MAX_UPLOADS))
                if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                    receive = await self._checked_body(scope, exchange)
                await self._until_closing(scope, receive, send)
        except RequestError as error:
            await exchange.refuse(Refusal(error.status, error.message, headers=error.headers))
        except ClientGone:
            return

    @contextlib.contextmanager
    def _counted(self, name: str, most: int) -> Iterator[None]:
        if self._open[name] >= most:
            raise RequestError(429, "too many requests at a time; close other pages or wait", headers={"Retry-After": "5"})
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]

    def _check_head(self, scope: Scope, most: int) -> None:
        headers, path = Headers(scope=scope), path_of(scope)
        is_link = scope["method"] in ("GET", "HEAD") and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        check_source(headers, self.settings, is_link=is_link)
        check_length(headers, most)
        self._check_path(unquote(path))
        if scope["method"] == "POST" and path not in LOGIN and not self.is_known(Request(scope)):
            raise RequestError(401, "Not authenticated")

    async def _checked_body(self, scope: Scope, exchange: Exchange) -> Receive:
        body = await _read(exchange)
        path = path_of(scope)
        if path == UPLOAD:
            if not Headers(scope=scope).get("content-type", "").lower().startswith("multipart/form-data"):
                raise RequestError(400, "uploads are multipart/form-data")
            await check_upload(Request(scope, _replay(body, exchange.receive)), self.settings)
            await to_thread.run_sync(self.folder.sweep_if_due)
        elif path not in LOGIN and body:
            self._check_value(parse_json(body))
        return _replay(body, exchange.receive)

    async def _until_closing(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A heartbeat lasts as long as its page is open, and a server that stops would wait for it."""
        if "/heartbeat/" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        task = asyncio.ensure_future(self.app(scope, receive, send))
        try:
            while not self.is_closing() and not (await asyncio.wait([task], timeout=HEARTBEAT_SECONDS))[0]:
                pass
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _check_path(self, path: str) -> None:
        """Files are served from the upload folder only, and nothing is passed on to another server."""
        if "/proxy=" in path:
            raise RequestError(400, "this server does not pass requests on")
        name = path.partition("/file=")[2]
        if name and not self.folder.holds(name):
            raise RequestError(400, "only files that were uploaded or made here are served")

    def _check_value(self, value: Any) -> None:
        if isinstance(value, dict):
            path, address = value.get("path"), value.get("url")
            if isinstance(path, str) and not self.folder.holds(path):
                raise RequestError(400, "a file is named by a path or address; upload it instead")
            if isinstance(address, str) and address.lstrip()[:5].lower() == "data:":
                raise RequestError(400, "a file comes inside the request; upload it instead")
            value = list(value.values())
        for entry in value if isinstance(value, list) else ():
            self._check_value(entry)


async def _read(exchange: Exchange) -> bytes:
    """Raises `RequestError` 408 or 413 as `Exchange.receive`, `ClientGone` where the client left."""
    parts = []
    while not exchange.is_read:
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives `body` again, then what else comes (a disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
