"""What a server on the open net receives: each is a 4xx in OpenAI's shape with a clear message, and the server stays well."""

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from PIL import Image
from test_api import ask, png, serving, uri

from demo import serve
from demo.api import create_api
from demo.api_pictures import claimed_size, kind_of
from demo.api_settings import Settings
from orthus.serving import PromptTooLong

TOKEN = "a token of the tests"
LIMITS = Settings(model_name="fake", max_body_bytes=400_000, max_image_bytes=100_000, max_pixels=1_000_000, max_text=2_000,
                  max_messages=8, max_pictures=2, body_seconds=0.4)  # fmt: skip
CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_api(FakeEngine(), LIMITS)) as client:
        yield client


def is_well(client: TestClient) -> bool:
    answer = client.post(CHAT, json=ask("abc"))
    return client.get("/health").status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "cba"


def check(response: Any, status: int, words: str) -> None:
    assert response.status_code == status, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"], error
    assert len(error["message"]) < 500


# Fields

LONG = "a" * 2_001
PARTS: Any = [{"type": "text", "text": "a"}]
BAD_CHATS: list[tuple[str, Any, int, str]] = [
    ("no messages", {"model": "fake"}, 400, "messages"),
    ("messages empty", {"messages": []}, 400, "messages"),
    ("messages a string", {"messages": "hello"}, 400, "messages"),
    ("a message a string", {"messages": ["hello"]}, 400, "messages.0"),
    ("system", {"messages": [{"role": "system", "content": "a"}]}, 400, "system message"),
    ("tool", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
    ("no content", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ("content null", {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ("content a number", {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    ("content empty", ask(""), 400, "messages.0 is empty"),
    ("content blank", ask("  \n\t "), 400, "messages.0 is empty"),
    ("no parts", {"messages": [{"role": "user", "content": []}]}, 400, "messages.0.content"),
    ("unknown part", ask([{"type": "input_audio"}]), 400, "input_audio"),  # type: ignore[arg-type]
    ("part without text", ask([{"type": "text"}]), 400, "text: Field required"),  # type: ignore[arg-type]
    ("picture a string", ask([{"type": "image_url", "image_url": "x"}]), 400, "image_url"),  # type: ignore[arg-type]
    ("assistant last", {"messages": [*ask("a")["messages"], {"role": "assistant", "content": "b"}]}, 400, "must be the user's"),
    ("too many messages", {"messages": ask("a")["messages"] * 9}, 400, "9 messages; at most 8"),
    ("huge prompt", ask(LONG), 400, "2001 characters; at most 2000"),
    ("huge in pieces", ask([{"type": "text", "text": "a" * 1001}] * 2), 400, "at most 999"),  # type: ignore[arg-type]
    ("other model", {**ask("a"), "model": "gpt-4o"}, 404, "'fake'"),
    ("model a number", {**ask("a"), "model": 3}, 400, "model"),
    ("unknown field", ask("a", tools=[]), 400, "tools: this field is not supported"),
    ("stop", ask("a", stop=["x"]), 400, "stop is not supported"),
    ("n zero", ask("a", n=0), 400, "n:"),
    ("n many", ask("a", n=99), 400, "at most 4"),
    ("n a string", ask("a", n="2"), 400, "n:"),
    ("n a float", ask("a", n=1.5), 400, "n:"),
    ("n true", ask("a", n=True), 400, "n:"),
    ("temperature low", ask("a", temperature=-0.1), 400, "temperature"),
    ("temperature high", ask("a", temperature=3), 400, "temperature"),
    ("temperature a string", ask("a", temperature="hot"), 400, "temperature"),
    ("top_p zero", ask("a", top_p=0), 400, "top_p"),
    ("top_p high", ask("a", top_p=1.1), 400, "top_p"),
    ("max_tokens zero", ask("a", max_tokens=0), 400, "max_tokens"),
    ("max_tokens endless", ask("a", max_tokens=10**12), 400, "max_tokens"),
    ("max_tokens negative", ask("a", max_completion_tokens=-1), 400, "max_completion_tokens"),
    ("seed negative", ask("a", seed=-1), 400, "seed"),
    ("seed huge", ask("a", seed=2**64), 400, "seed"),
    ("seed a float", ask("a", seed=0.5), 400, "seed"),
    ("stream a string", ask("a", stream="yes"), 400, "stream"),
    ("stream options", ask("a", stream_options={"include": 1}), 400, "stream_options.include"),
    ("json asked for", ask("a", response_format={"type": "json_object"}), 400, "response_format.type"),
    ("penalty", ask("a", presence_penalty=1), 400, "presence_penalty"),
    ("logprobs", ask("a", logprobs=True), 400, "logprobs"),
    ("modality", ask("a", modality="video"), 400, "modality"),
    ("guidance low", ask("a", guidance=-1), 400, "guidance"),
    ("guidance high", ask("a", guidance=1e9), 400, "guidance"),
    ("interval short", ask("a", guidance_interval=[0.1]), 400, "guidance_interval"),
    ("interval upside down", ask("a", guidance_interval=[0.9, 0.1]), 400, "guidance_interval"),
    ("steps zero", ask("a", num_diffusion_steps=0), 400, "num_diffusion_steps"),
    ("steps above the limit", ask("a", num_diffusion_steps=101), 400, "num_diffusion_steps is more than 100"),
    ("steps many", ask("a", num_diffusion_steps=10**6), 400, "num_diffusion_steps"),
    ("solver", ask("a", solver="magic"), 400, "solver"),
    ("max_images negative", ask("a", max_images=-1), 400, "max_images"),
    ("force_image a number", ask("a", force_image=1), 400, "force_image"),
    ("preview_every negative", ask("a", preview_every=-1), 400, "preview_every"),
    ("negative prompt blank", ask("a", negative_prompt=" "), 400, "negative_prompt is empty"),
    ("negative prompt long", ask("a", negative_prompt=LONG), 400, "negative_prompt has 2001"),
    ("user long", ask("a", user="a" * 300), 400, "user"),
    ("image guidance without picture", ask("a", image_guidance=1.0), 400, "no picture"),
]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            PromptTooLong("a prompt of 300 positions and 1 new ones", 300, 256),
            "context_length_exceeded",
            "300 of the 256 positions",
        ),
        (ValueError("force_image=True needs max_new_tokens of 18"), "invalid_prompt", "force_image=true needs max_tokens of 18"),
    ],
)
def test_what_the_engine_refuses_is_told_in_words_of_the_api(error: ValueError, code: str, message: str) -> None:
    engine = FakeEngine()

    def refuse(*values: Any) -> Any:
        raise error

    engine.submit_all = refuse  # type: ignore[method-assign]
    with TestClient(create_api(engine, LIMITS)) as client:
        response = client.post(CHAT, json=ask("a"))
    check(response, 400, message)
    assert response.json()["error"]["code"] == code and "new ones" not in response.text


@pytest.mark.parametrize(("body", "status", "words"), [case[1:] for case in BAD_CHATS], ids=[case[0] for case in BAD_CHATS])
def test_bad_fields_of_a_chat(client: TestClient, body: Any, status: int, words: str) -> None:
    check(client.post(CHAT, json=body), status, words)
    check(client.post(CHAT, json={**body, "stream": body.get("stream", True)}), status, words)


BAD_DRAWS: list[tuple[str, Any, str]] = [
    ("no prompt", {}, "prompt"),
    ("prompt empty", {"prompt": ""}, "prompt"),
    ("prompt blank", {"prompt": "   "}, "prompt is empty"),
    ("prompt a list", {"prompt": ["a"]}, "prompt"),
    ("prompt long", {"prompt": LONG}, "2001 characters"),
    ("size", {"prompt": "a", "size": "1024x1024"}, "draws 8x8"),
    ("size forged", {"prompt": "a", "size": "8x8; rm"}, "draws 8x8"),
    ("url", {"prompt": "a", "response_format": "url"}, "b64_json"),
    ("jpeg", {"prompt": "a", "output_format": "jpeg"}, "png"),
    ("quality", {"prompt": "a", "quality": "hd"}, "quality"),
    ("style", {"prompt": "a", "style": "vivid"}, "style"),
    ("partial_images", {"prompt": "a", "partial_images": 4}, "partial_images"),
    ("text only", {"prompt": "a", "modality": "text"}, "modality"),
]


@pytest.mark.parametrize(("body", "words"), [case[1:] for case in BAD_DRAWS], ids=[case[0] for case in BAD_DRAWS])
def test_bad_fields_of_a_drawing(client: TestClient, body: Any, words: str) -> None:
    check(client.post(DRAW, json=body), 400, words)


# Text

CONTROLS = ["\x00", "\x07", "\x08", "\x1b[31m", "\x7f", "\x85", "\x9b", "\x0b", "\ufffe", "\ud800", "\udc00\ud800"]


@pytest.mark.parametrize("text", CONTROLS, ids=ascii)
def test_control_characters_are_refused(client: TestClient, text: str) -> None:
    body = json.dumps(ask(f"draw {text} now"))
    check(client.post(CHAT, content=body, headers={"content-type": "application/json"}), 400, "position 5")
    body = json.dumps({"prompt": "a", "negative_prompt": text + "a"})
    check(client.post(DRAW, content=body, headers={"content-type": "application/json"}), 400, "position 0")
    if text.isascii():
        check(client.post(EDIT, files={"image": png()}, data={"prompt": f"a{text}"}), 400, "position 1")


STRANGE = ["<sep> a <eoi> b <image> <pad>", "a\nb\tc\r\nd", "日本語 🦄 é", "\u202eabc", "{{7*7}} ${x} <script>"]


@pytest.mark.parametrize("text", STRANGE)
def test_strange_text_is_text(client: TestClient, text: str) -> None:
    assert client.post(CHAT, json=ask(text)).status_code == 200


# JSON

FORGED = [
    (b"", "not JSON"), (b"{", "not JSON"), (b"null", "an object"), (b"[]", "an object"), (b'"a"', "an object"),
    (b"\xff\xfe{}", ""), (b"\x80", "UTF-8"), (b'{"n": NaN}', "NaN"), (b'{"n": -Infinity}', "Infinity"),
    (b'{"n": 1, "n": 2}', "twice"), (b'{"a":' * 17 + b"1" + b"}" * 17, "deeper than 16"), (b"[" * 50_000, "deeper"),
    (b'{"a":' * 20_000, "deeper"), (b'{"messages": [' + b"[]," * 60_000 + b"[]]}", "more than 100000 values"),
    (b'{"n": 1' + b"0" * 5_000 + b"}", "acceptable JSON"), (b'{"prompt": "\\ud800"', "not JSON"), (b"{'prompt': 1}", "not JSON"),
    (b'{"__proto__": {"x": 1}}', "Field required"), (b'{"prompt": "a"} {"prompt": "b"}', "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), FORGED, ids=[str(place) for place in range(len(FORGED))])
def test_forged_json(client: TestClient, body: bytes, words: str) -> None:
    headers = {"content-type": "application/json"}
    check(client.post(CHAT, content=body, headers=headers), 400, words)
    check(client.post(DRAW, content=body, headers=headers), 400, words)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_other_content_types_are_refused(client: TestClient, kind: str) -> None:
    check(client.post(CHAT, content=json.dumps(ask("a")), headers={"content-type": kind}), 415, "application/json")


# Pictures


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb_png(width: int, height: int) -> bytes:
    """A small file that claims, and holds, very many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\x00" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb_gif() -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\x00" * 6 + frame


def bomb_webp(kind: bytes) -> bytes:
    body = {
        b"VP8X": b"\x10\x00\x00\x00" + b"\xfe\x3f\x00" * 2,
        b"VP8L": b"\x2f" + (0x3FFF | 0x3FFF << 14).to_bytes(4, "little") + b"\x00" * 12,
        b"VP8 ": b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 0x3FFF, 0x3FFF) + b"\x00" * 12,
    }[kind]
    data = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(data)) + data


def text_bomb_png() -> bytes:
    """A compressed text chunk of many megabytes beside one pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"a" * 60_000_000, 9))
    return b"\x89PNG\r\n\x1a\n" + header + text + chunk(b"IDAT", zlib.compress(b"\x00\xff\x00\x00")) + chunk(b"IEND", b"")


def cut(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


BAD_PICTURES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 400, "empty"),
    ("text", b"hello", 400, "not PNG"),
    ("html", b"<html><script>", 400, "not PNG"),
    ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not PNG"),
    ("pdf", b"%PDF-1.7 ...", 400, "not PNG"),
    ("tiff", png(format="TIFF"), 400, "not PNG"),
    ("bmp", png(format="BMP"), 400, "not PNG"),
    ("ico", png(format="ICO", size=(16, 16)), 400, "not PNG"),
    ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", 400, "not PNG"),
    ("zip", b"PK\x03\x04", 400, "not PNG"),
    ("pickle", b"\x80\x04\x95", 400, "not PNG"),
    ("signature of PNG alone", b"\x89PNG\r\n\x1a\n", 400, "as PNG"),
    ("signature of JPEG alone", b"\xff\xd8\xff", 400, "as JPEG"),
    ("signature of GIF alone", b"GIF89a", 400, "as GIF"),
    ("signature of WebP alone", b"RIFF\x00\x00\x00\x00WEBP", 400, "as WEBP"),
    ("JPEG called PNG", b"\x89PNG\r\n\x1a\n" + png(format="JPEG"), 400, "as PNG"),
    ("PNG cut", cut("PNG"), 400, "damaged or cut short"),
    ("JPEG cut", cut("JPEG"), 400, "damaged or cut short"),
    ("GIF cut", cut("GIF"), 400, "damaged or cut short"),
    ("WebP cut", cut("WEBP"), 400, "damaged or cut short"),
    ("PNG bomb", bomb_png(60_000, 60_000), 413, "60000 x 60000 pixels"),
    ("PNG bomb within a side", bomb_png(1_000_001, 1), 413, "1000001 x 1 pixels"),
    ("PNG of no pixels", bomb_png(0, 10), 400, "0 x 10"),
    ("PNG too thin", bomb_png(1, 900), 400, "at most 64 times"),
    ("PNG text bomb", text_bomb_png(), 400, "as PNG"),
    ("GIF bomb", bomb_gif(), 413, "65535 x 65535 pixels"),
    ("WebP bomb", bomb_webp(b"VP8X"), 413, "16383 x 16383 pixels"),
    ("WebP bomb, lossless", bomb_webp(b"VP8L"), 413, "16384 x 16384 pixels"),
    ("WebP bomb, lossy", bomb_webp(b"VP8 "), 413, "16383 x 16383 pixels"),
    ("WebP of nothing", b"RIFF\x1e\x00\x00\x00WEBPABCD" + b"\x00" * 20, 400, "as WEBP"),
    ("too many bytes", png() + b"\x00" * 100_000, 413, "at most 100000"),
]


@pytest.mark.parametrize(("data", "status", "words"), [case[1:] for case in BAD_PICTURES], ids=[case[0] for case in BAD_PICTURES])
def test_bad_pictures(client: TestClient, data: bytes, status: int, words: str) -> None:
    check(client.post(EDIT, files={"image": ("a.png", data, "image/png")}, data={"prompt": "a"}), status, words)
    parts: Any = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": uri(data)}}]
    response = client.post(CHAT, json=ask(parts))
    check(response, status, words)
    assert response.json()["error"]["param"] == "messages.0.content.1"


def test_fuzzed_pictures_are_decoded_or_refused(client: TestClient) -> None:
    """Flipped, cut and repeated bytes of real files: never a 500."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    statuses = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(data), rng.integers(1, 12)):
                data[place] = rng.integers(0, 256)
            data = data[: rng.integers(8, len(data) + 1)] if rng.random() < 0.4 else data
            response = client.post(EDIT, files={"image": bytes(data)}, data={"prompt": "a"})
            statuses.append(response.status_code)
    assert set(statuses) <= {200, 400, 413} and statuses.count(400) > 20, statuses
    assert is_well(client)


BAD_URIS = [
    ("http://example.com/a.png", "fetches no URLs"), ("https://169.254.169.254/latest/meta-data", "fetches no URLs"),
    ("http://127.0.0.1:8000/health", "fetches no URLs"), ("file:///etc/passwd", "opens no files"),
    ("/etc/passwd", "opens no files"),
    ("../../../etc/passwd", "opens no files"), ("ftp://a/b", "fetches no URLs"), ("", "send the picture itself"),
    ("data:", "data:image/...;base64,"), ("data:text/html;base64,PGI+", "data:image/"), ("data:image/png,abc", "base64"),
    ("data:image/png;base64", "base64"), ("data:image/png;base64,", "empty"), ("data:image/png;base64,%%%%", "not valid base64"),
    ("data:image/png;base64,aGVsbG8", "not valid base64"), ("data:image/png;base64,aGVs\nbG8=", "not valid base64"),
    ("data:image/svg+xml;base64,PHN2Zz4=", "not PNG"), ("data:image/png;base64,é", "not valid base64"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "words"), BAD_URIS, ids=[case[0][:24] for case in BAD_URIS])
def test_nothing_is_opened_or_fetched(client: TestClient, address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: Any = [{"type": "image_url", "image_url": {"url": address}}]
    check(client.post(CHAT, json=ask(parts)), 400, words)


def test_too_much_base64_is_refused_before_it_is_decoded(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *values, **named: pytest.fail("decoded"))
    parts: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}]
    check(client.post(CHAT, json=ask(parts)), 413, "at most 100000")


def test_too_many_pictures(client: TestClient) -> None:
    parts: Any = [{"type": "image_url", "image_url": {"url": uri(png())}}] * 3
    check(client.post(CHAT, json=ask(parts)), 400, "3 pictures; at most 2")


def test_claimed_sizes_are_those_of_the_decoder() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 50})]
    for kind, options in [*cases, ("WEBP", {"exif": b"Exif\x00\x00a"})]:
        data = png(format=kind, size=(123, 45), **options)
        assert kind_of(data) == kind and claimed_size(kind, data) == (123, 45), options


def bomb_jpeg() -> bytes:
    """A JPEG whose frame header claims 65500 x 65500 pixels."""
    data = png(format="JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 65_500, 65_500) + data[place + 4 :]


def test_a_jpeg_bomb_is_refused_by_its_header(client: TestClient) -> None:
    check(client.post(EDIT, files={"image": bomb_jpeg()}, data={"prompt": "a"}), 413, "1000000")


# Forms

FORMS: list[tuple[str, dict[str, Any], int, str]] = [
    ("no image", {"data": {"prompt": "a"}, "files": {"other": png()}}, 400, "'other' must be text"),
    ("image as text", {"data": {"prompt": "a", "image": "/etc/passwd"}, "files": {}}, 415, "multipart/form-data"),
    ("no prompt", {"files": {"image": png()}}, 400, "prompt"),
    ("prompt empty", {"files": {"image": png()}, "data": {"prompt": ""}}, 400, "prompt"),
    ("prompt as file", {"files": {"image": png(), "prompt": b"a"}}, 400, "'prompt' must be text"),
    ("two images", {"files": [("image", png()), ("image", png())], "data": {"prompt": "a"}}, 400, "2 files"),
    ("three images", {"files": [("image[]", png())] * 3, "data": {"prompt": "a"}}, 400, "Too many files"),
    ("mask", {"files": {"image": png(), "mask": png()}, "data": {"prompt": "a"}}, 400, "'mask' must be text"),
    ("unknown field", {"files": {"image": png()}, "data": {"prompt": "a", "path": "../../x"}}, 400, "path: this field"),
    ("n no number", {"files": {"image": png()}, "data": {"prompt": "a", "n": "many"}}, 400, "n:"),
    ("prompt twice", {"files": {"image": png()}, "data": {"prompt": ["a", "b"]}}, 400, "occurs twice"),
    ("many fields", {"files": {"image": png()}, "data": {f"f{place}": "a" for place in range(99)}}, 400, "Too many fields"),
    ("long field", {"files": {"image": png()}, "data": {"prompt": "a" * 300_000}}, 400, "Part exceeded"),
    ("no boundary", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    ("broken", {"content": b"--x\r\nbad", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "prompt"),
    ("no name", {"content": b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
                 "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "name"),
    ("json", {"json": {"prompt": "a"}}, 415, "multipart/form-data"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "status", "words"), [case[1:] for case in FORMS], ids=[case[0] for case in FORMS])
def test_bad_forms(client: TestClient, request_: dict[str, Any], status: int, words: str) -> None:
    check(client.post(EDIT, **request_), status, words)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "a\x00b.png", "C:\\x", "%2e%2e%2f", "a" * 3000])
def test_names_of_files_mean_nothing(client: TestClient, name: str) -> None:
    response = client.post(EDIT, files={"image": (name, png(), "application/x-sh")}, data={"prompt": "a"})
    assert response.status_code == 200 and "passwd" not in response.text


# Whole requests


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_wrong_methods(client: TestClient, method: str) -> None:
    check(client.request(method, CHAT), 405, "Not Allowed")


@pytest.mark.parametrize("path", ["/v1/", "/v1/../../etc/passwd", "/v1/embeddings", "/docs", "/openapi.json"])
def test_unknown_paths(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404 and "error" in client.get(path).json()


def test_bodies_have_a_limit_however_they_come(client: TestClient) -> None:
    check(client.post(CHAT, content=b" " * 400_001), 413, "exceeds 400000 bytes")
    pieces = (b" " * 50_000 for _ in range(10))
    check(client.post(CHAT, content=pieces, headers={"content-type": "application/json"}), 413, "exceeds 400000 bytes")


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"content-length": "-5"}, 400, "Content-Length"),
        ({"content-length": "9" * 30}, 400, "Content-Length"),
        ({"content-encoding": "gzip"}, 415, "compressed"),
        ({"sec-fetch-site": "cross-site"}, 403, "other sites"),
        ({"origin": "https://evil.example"}, 403, "other sites"),
        ({"origin": "null"}, 403, "other sites"),
    ],
)
def test_bad_headers(client: TestClient, headers: dict[str, str], status: int, words: str) -> None:
    check(client.post(CHAT, json=ask("a"), headers=headers), status, words)


TOKENS = ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN,
          f"Bearer {TOKEN.upper()}", "Bearer \u00e9"]  # fmt: skip


@pytest.mark.parametrize("given", TOKENS, ids=[str(place) for place in range(len(TOKENS))])
def test_wrong_tokens(given: str) -> None:
    with TestClient(create_api(FakeEngine(), Settings(token=TOKEN))) as client:
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            response = client.get(path, headers={"authorization": given.encode("latin-1")})  # type: ignore[dict-item]
            check(response, 401, "valid token")
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200


def test_a_prefix_of_a_proxy_does_not_lead_around_the_token() -> None:
    with TestClient(create_api(FakeEngine(), Settings(token=TOKEN)), root_path="/x") as client:
        for path in ("/x/v1/models", "/v1/models", "/x/metrics"):
            assert client.get(path).status_code == 401, path


@pytest.mark.parametrize("token", ["", "short", "with\nline and more", "ünïcode token"])
def test_tokens_that_are_none(token: str) -> None:
    with pytest.raises(ValueError, match="token must be at least 8"):
        Settings(token=token)
    with pytest.raises(ValueError, match="max_text=0 must be greater than 0"):
        Settings(max_text=0)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "localhost@evil", "[::2]"])
def test_names_of_others_for_this_machine(host: str) -> None:
    with TestClient(create_api(FakeEngine(), Settings(allowed_hosts=serve.LOOPBACK))) as client:
        check(client.get("/v1/models", headers={"host": host}), 403, "Host")
        for good in ("127.0.0.1:8000", "localhost", "[::1]:8000", "[::1]"):
            assert client.get("/v1/models", headers={"host": good}).status_code == 200, good


# The wire


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch, serving_patiently(patch) as url:
        yield int(url.rpartition(":")[2])


def serving_patiently(patch: pytest.MonkeyPatch) -> Any:
    import contextlib

    @contextlib.contextmanager
    def start() -> Iterator[str]:
        patch.setattr(serve, "HEADER_SECONDS", 0.4)
        with serving(FakeEngine(), LIMITS) as (url, _):
            yield url

    return start()


def talk(port: int, pieces: list[bytes], pause: float = 0.0, seconds: float = 5.0) -> tuple[bytes, float]:
    """Send pieces with pauses until the server ends the connection; what it said, and after how long."""
    started = time.monotonic()
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass
        try:
            while data := connection.recv(65536):
                received += data
        except ConnectionResetError:
            pass
    return received, time.monotonic() - started


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
WIRE: list[tuple[str, list[bytes], float, int]] = [
    ("nothing at all", [], 0.0, 408),
    ("headers byte by byte", [bytes([byte]) for byte in HEAD], 0.02, 408),
    ("headers without end", [HEAD], 0.0, 408),
    ("body byte by byte", [HEAD + b"Content-Length: 900\r\n\r\n", *[b"{"] * 60], 0.02, 408),
    ("body that never comes", [HEAD + b"Content-Length: 900\r\n\r\n"], 0.0, 408),
    ("chunks that never end", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 60], 0.02, 408),
    ("no HTTP", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n"], 0.0, 400),
    ("huge headers", [HEAD + b"X: " + b"a" * 70_000], 0.0, 400),
    ("two lengths", [HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"], 0.0, 400),
    ("length no number", [HEAD + b"Content-Length: five\r\n\r\n"], 0.0, 400),
    ("chunk no number", [HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], 0.0, 400),
    ("smuggled", [HEAD + b"Transfer-Encoding: gzip\r\n\r\n"], 0.0, 501),
    ("too long", [HEAD + b"Content-Length: 99999999\r\n\r\n"], 0.0, 413),
]


@pytest.mark.parametrize(("pieces", "pause", "status"), [case[1:] for case in WIRE], ids=[case[0] for case in WIRE])
def test_bad_and_slow_connections_end_in_words(port: int, pieces: list[bytes], pause: float, status: int) -> None:
    received, seconds = talk(port, pieces, pause)
    status_line, _, rest = received.partition(b"\r\n")
    assert status_line.startswith(f"HTTP/1.1 {status}".encode()) or (status == 501 and b" 400 " in status_line), received
    assert seconds < 4.0
    if status != 501:
        assert json.loads(rest.partition(b"\r\n\r\n")[2])["error"]["message"] and b"nosniff" in rest
    fine, _ = talk(port, [b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"])
    assert b'"status":"ok"' in fine


def test_many_idle_connections_do_not_keep_others_out(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    fine, _ = talk(port, [b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"])
    assert b'"status":"ok"' in fine
    for connection in idle:
        connection.close()


def test_the_server_is_well_after_all_of_them(client: TestClient) -> None:
    assert is_well(client)
