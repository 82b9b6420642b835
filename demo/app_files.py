"""The folder of uploads and results: what of it may be read, which uploads go in, and how it is kept small."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from demo.api_errors import RequestError
from demo.api_pictures import FORMATS, kind_of
from demo.api_settings import Settings

FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif"]
FILE_SECONDS = 3600.0  # for which uploads and pictures for API clients are kept
CHECK_SECONDS = 60.0  # between two looks for files that are older
MAX_STORED_BYTES = 1_000_000_000  # of all files; beyond it the oldest go
MAX_FIELDS = 4  # of an upload, beside its files


class Folder:
    """Where Gradio stores files. Those that are there when `keep` is called belong to the page and stay."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._kept: frozenset[Path] = frozenset()
        self._swept = 0.0
        self._lock = threading.Lock()

    def holds(self, name: str) -> bool:
        """Whether `name` is an absolute path in the folder, links followed."""
        try:
            path = Path(name)
            return path.is_absolute() and path.resolve().is_relative_to(self.path)
        except (OSError, ValueError, RuntimeError):
            return False

    def keep(self) -> None:
        self._kept = frozenset(path for path in self.path.rglob("*") if path.is_file())

    def sweep_if_due(self) -> None:
        """Sweeps at most every `CHECK_SECONDS`."""
        with self._lock:
            if time.monotonic() - self._swept < CHECK_SECONDS:
                return
            self._swept = time.monotonic()
        self.sweep()

    def sweep(self, seconds: float = FILE_SECONDS, max_bytes: int = MAX_STORED_BYTES) -> None:
        """Removes files older than `seconds`, whoever left them, then the oldest until `max_bytes` are left."""
        found = []
        for path in self.path.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path not in self._kept and path.is_file():
                    state = path.stat()
                    found.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            if changed > time.time() - seconds and total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def picture_input(folder: Folder, value: str | None = None, **options: Any) -> gr.Image:
    """A `gr.Image` whose value is the path of the stored upload: nothing is decoded before `Desk.read` looked at it.

    Not a class of its own: Gradio writes a stub beside the source of every component class.
    """

    def stored(payload: Any) -> str | None:
        if payload is None or payload.path is None:
            return None
        if not folder.holds(payload.path):
            raise gr.Error("The picture was not uploaded here; upload it.", print_exception=False)
        return str(payload.path)

    part = gr.Image(value, image_mode=None, sources=["upload", "clipboard"], buttons=[], **options)
    part.preprocess = stored  # type: ignore[method-assign]
    return part


async def check_upload(request: Request, settings: Settings) -> None:
    """Raises `RequestError` 400 for what is no picture by its first bytes and for a damaged body, 413 for a large picture."""
    try:
        async with request.form(max_files=settings.max_pictures, max_fields=MAX_FIELDS) as form:
            for _, part in form.multi_items():
                if not isinstance(part, UploadFile):
                    raise RequestError(400, "an upload holds files and nothing else")
                if (part.size or 0) > settings.max_image_bytes:
                    raise RequestError(413, f"a picture may have at most {settings.max_image_bytes} bytes")
                if kind_of(await part.read(16)) is None:
                    raise RequestError(400, f"the file is not {FORMATS}, judged by its content")
    except (HTTPException, MultiPartException):
        raise RequestError(400, "the upload is damaged") from None
