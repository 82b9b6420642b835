"""Bodies of requests: bytes -> checked Python objects, and text without control characters."""

import json
import re
import unicodedata
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from demo.api_errors import RequestError
from demo.api_settings import Settings

MAX_DEPTH = 16
MAX_MARKS = 100_000  # braces, brackets, commas and colons: what makes a small body a large object
MAX_FIELDS = 32


async def read_json(request: Request) -> dict[str, Any]:
    """Raises `RequestError` 415 for another content type (which also keeps other sites' forms out), 400 for bad JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(415, "Content-Type must be application/json", code="unsupported_media_type")
    return parse_json(await request.body())


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object without the traps: depth, number of values, repeated names, NaN, numbers without end."""
    if sum(body.count(mark) for mark in b"{[,:") > MAX_MARKS:
        raise RequestError(400, f"the JSON body has more than {MAX_MARKS} values", code="invalid_json")
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise RequestError(400, f"the JSON body is nested deeper than {MAX_DEPTH} levels", code="invalid_json") from None
    except UnicodeDecodeError:
        raise RequestError(400, "the JSON body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise RequestError(400, message, code="invalid_json") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not acceptable JSON: {error}"[:200], code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the JSON body must be an object", code="invalid_json")
    if _depth(value) > MAX_DEPTH:
        raise RequestError(400, f"the JSON body is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        children = [entry for part in level for entry in (part.values() if isinstance(part, dict) else part)]
        level = [entry for entry in children if isinstance(entry, dict | list)]
    return depth


async def read_form(request: Request, settings: Settings, file_names: tuple[str, ...]) -> tuple[dict[str, str], list[bytes]]:
    """A multipart body -> its text fields and its files' contents. File names are never looked at.

    Raises `RequestError` 415 for another content type, 400 for a damaged body, repeated fields, and files where text belongs or
    the other way round.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise RequestError(415, "Content-Type must be multipart/form-data", code="unsupported_media_type")
    await request.body()  # whole and within its limit before anything is parsed
    fields: dict[str, str] = {}
    files: list[bytes] = []
    try:
        async with request.form(max_files=settings.max_pictures, max_fields=MAX_FIELDS, max_part_size=1 << 18) as form:
            for name, value in form.multi_items():
                is_file = isinstance(value, UploadFile)
                if is_file != (name in file_names):
                    raise RequestError(400, f"field {name[:64]!r} must be {'text' if is_file else 'a file'}", name[:64])
                if isinstance(value, UploadFile):
                    files.append(await value.read())
                elif name in fields:
                    raise RequestError(400, f"field {name[:64]!r} occurs twice", name[:64])
                else:
                    fields[name] = value
    except HTTPException as error:
        raise RequestError(400, f"the multipart body is damaged: {error.detail}"[:300], code="invalid_form") from None
    return fields, files


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def check_text(text: str, param: str, max_length: int) -> str:
    """Text as it is. Raises `RequestError` 400 for control characters (all but tab and line ends), which are refused and not
    stripped, for halves of surrogate pairs, and for more than `max_length` characters."""
    if len(text) > max_length:
        message = f"{param} has {len(text)} characters; at most {max_length} are accepted"
        raise RequestError(400, message, param, "string_too_long")
    found = CONTROL.search(text)
    if found:
        name = unicodedata.name(found[0], f"U+{ord(found[0]):04X}")
        message = f"{param} holds the control character {name} at position {found.start()}; leave it out"
        raise RequestError(400, message, param, "control_character")
    return text
