"""Pictures from outside: bytes are measured before they are decoded; nothing is opened by name and nothing is fetched."""

import base64
import binascii
import io
import struct

from PIL import Image

from demo.api_errors import RequestError
from demo.api_settings import Settings
from orthus.image_processing import DECODE_ERRORS, OrthusImageProcessor, to_rgb

FORMATS = "PNG, JPEG, WebP or GIF"


def kind_of(data: bytes) -> str | None:
    """Pillow's name of the format, from the first bytes; None for what is not accepted."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def claimed_size(kind: str, data: bytes) -> tuple[int, int] | None:
    """Width and height that the header claims, before Pillow sees it; None for JPEG, where Pillow reads no more than a header.

    WebP is RFC 9649: Pillow's reader would reserve the canvas before it tells the size. Raises ValueError where there is none.
    """
    if kind == "PNG" and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if kind == "GIF" and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
        return width, height
    return _webp_size(data[12:16], data[20:30]) if kind == "WEBP" else None


def _webp_size(chunk: bytes, body: bytes) -> tuple[int, int]:
    if len(body) < 10:
        raise ValueError("the WebP header is cut short")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L" and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("the WebP header has no size")


def read_picture(data: bytes, processor: OrthusImageProcessor, settings: Settings, param: str) -> Image.Image:
    """Bytes of a file -> upright RGB of the model's size, without EXIF and other metadata; of an animation the first frame.

    Raises `RequestError` 413 for too many bytes or pixels, 400 for another type and for damage.
    """
    if not data:
        raise RequestError(400, "the picture is empty", param, "invalid_image")
    if len(data) > settings.max_image_bytes:
        message = f"the picture has {len(data)} bytes; at most {settings.max_image_bytes} are accepted"
        raise RequestError(413, message, param, "image_too_large")
    kind = kind_of(data)
    if kind is None:
        raise RequestError(400, f"the picture is not {FORMATS}, judged by its content", param, "invalid_image_format")
    try:
        _check_size(claimed_size(kind, data), settings, param)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_size(image.size, settings, param)
            picture = processor.prepare(to_rgb(image))
        return Image.frombytes("RGB", picture.size, picture.tobytes())  # pixels and nothing else
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"the picture has more than {settings.max_pixels} pixels", param, "image_too_large") from error
    except (*DECODE_ERRORS, MemoryError) as error:
        message = f"the picture cannot be decoded as {kind}: it is damaged or cut short"
        raise RequestError(400, message, param, "invalid_image") from error


def _check_size(size: tuple[int, int] | None, settings: Settings, param: str) -> None:
    if size is None:
        return
    width, height = size
    if width * height > settings.max_pixels:
        message = f"the picture has {width} x {height} pixels; at most {settings.max_pixels} in all are accepted"
        raise RequestError(413, message, param, "image_too_large")
    if min(size) < 1 or max(size) > settings.max_aspect * min(size):
        message = f"the picture has {width} x {height} pixels; one side may be at most {settings.max_aspect} times the other"
        raise RequestError(400, message, param, "invalid_image")


def picture_from_uri(uri: str, processor: OrthusImageProcessor, settings: Settings, param: str) -> Image.Image:
    """A `data:image/...;base64,` URI -> picture. Raises `RequestError` as `read_picture`, and 400 for every other URI."""
    head, comma, body = uri.partition(",")
    if head[:5].lower() != "data:":
        message = "the server opens no files and fetches no URLs; send the picture itself: data:image/png;base64,..."
        raise RequestError(400, message, param, "url_not_supported")
    kind, *flags = head[5:].lower().split(";")
    if not comma or not kind.startswith("image/") or "base64" not in flags:
        raise RequestError(400, "a data: URI must begin with data:image/...;base64,", param, "invalid_image_url")
    if len(body) > settings.max_image_bytes * 4 // 3 + 4:
        message = f"the picture has too many bytes; at most {settings.max_image_bytes} are accepted"
        raise RequestError(413, message, param, "image_too_large")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, "the data: URI is not valid base64", param, "invalid_base64") from error
    return read_picture(data, processor, settings, param)


def png_base64(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def data_uri(picture: Image.Image) -> str:
    return f"data:image/png;base64,{png_base64(picture)}"
