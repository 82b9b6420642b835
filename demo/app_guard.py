"""What the app accepts from outside: uploads, but no paths and no addresses.

Gradio fetches a file that a request names by its address, and where an app is mounted rather than launched it opens any path
that a request names. `AppGuard` refuses both before Gradio sees them.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import gradio as gr

from demo.api_guard import is_api

MAX_BODY_BYTES = 1_000_000  # of a request that is no upload
MAX_UPLOAD_BYTES = 32_000_000  # of all files of one upload; each is limited by `Settings.max_image_bytes`
HEARTBEAT_SECONDS = 0.5  # between two looks at whether the server stops
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def picture_input(value: str | None = None, **options: Any) -> gr.Image:
    """A `gr.Image` whose value is the path of the stored upload: nothing is decoded before `Desk.read` looked at it.

    Not a class of its own: Gradio writes a stub beside the source of every component class.
    """
    part = gr.Image(value, image_mode=None, sources=["upload", "clipboard"], buttons=[], **options)
    part.preprocess = _stored  # type: ignore[method-assign]
    return part


def _stored(payload: Any) -> str | None:
    return None if payload is None or payload.path is None else str(payload.path)


class AppGuard:
    """ASGI middleware for the part of an application that is Gradio's.

    Args:
        folder: where Gradio stores uploads.
        hosts: accepted `Host` names, empty for all; as `Settings.allowed_hosts`.
        is_closing: whether the server was told to stop, so that pages which are only open must not hold it.
    """

    def __init__(self, app: Any, folder: Path, hosts: Sequence[str], is_closing: Callable[[], bool]) -> None:
        self.app, self.folder, self.hosts, self.is_closing = app, folder.resolve(), hosts, is_closing

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_api(scope["path"]):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = self._refused_host(headers) or self._refused_path(unquote(scope["path"]))
        if refusal is None and headers.get(b"content-type", b"").startswith(b"multipart/"):
            length = headers.get(b"content-length", b"")
            if not length.isdigit() or int(length) > MAX_UPLOAD_BYTES:
                refusal = f"uploads state their length and have at most {MAX_UPLOAD_BYTES} bytes"
        elif refusal is None and scope["method"] == "POST":
            body = await _read(receive)
            refusal = "the request is too large" if body is None else None
            if body is not None and "gradio_api" in scope["path"]:
                refusal = self._refused_body(body)
            receive = _replay(body or b"", receive)
        if refusal is None:
            await self._until_closing(scope, receive, send)
            return
        answer = json.dumps({"detail": refusal}).encode()
        await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": answer})

    async def _until_closing(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """A heartbeat lasts as long as its page is open, and a server that stops would wait for it."""
        task = asyncio.ensure_future(self.app(scope, receive, send))
        while "/heartbeat/" in scope["path"] and not self.is_closing():
            if (await asyncio.wait([task], timeout=HEARTBEAT_SECONDS))[0]:
                break
        else:
            if "/heartbeat/" in scope["path"]:
                task.cancel()
        await asyncio.gather(task, return_exceptions="/heartbeat/" in scope["path"])

    def _refused_host(self, headers: dict[bytes, bytes]) -> str | None:
        """A web page elsewhere must not reach a server on the loopback interface through a name of its own."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        return "this Host is not served here" if self.hosts and name not in self.hosts else None

    def _refused_path(self, path: str) -> str | None:
        """Files are served from the upload folder only, and nothing is passed on to another server."""
        if "/proxy=" in path:
            return "this server does not pass requests on"
        name = path.partition("/file=")[2]
        return None if not name or self._is_stored(name) else "only files that were uploaded or made here are served"

    def _refused_body(self, body: bytes) -> str | None:
        try:
            return self._refused_value(json.loads(body)) if body else None
        except (ValueError, RecursionError):
            return "the request is not valid JSON"

    def _refused_value(self, value: Any) -> str | None:
        if isinstance(value, dict):
            path, address = value.get("path"), value.get("url")
            if isinstance(path, str) and not self._is_stored(path):
                return "a file is named by a path or address; upload it instead"
            if isinstance(address, str) and address.lstrip()[:5].lower() == "data:":
                return "a file comes inside the request; upload it instead"
            value = list(value.values())
        if isinstance(value, list):
            return next((found for entry in value if (found := self._refused_value(entry)) is not None), None)
        return None

    def _is_stored(self, name: str) -> bool:
        try:
            path = Path(name)
            return path.is_absolute() and path.resolve().is_relative_to(self.folder)
        except (OSError, ValueError):
            return False


async def _read(receive: Receive) -> bytes | None:
    """The body of a request, None for one that is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


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
