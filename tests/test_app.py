"""The app through its Gradio endpoint, what it refuses, and the parts of its pages."""

import contextlib
import io
import json
import os
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from app_server import PICTURE, ROOT, Server, served
from gradio.data_classes import ImageData
from gradio_client import Client, handle_file
from PIL import Image

from demo.api_settings import Settings
from demo.app_desk import Desk, Draft, outcome
from demo.app_files import Folder, picture_input
from demo.app_guard import MAX_BODY_BYTES, MAX_OPEN, MAX_UPLOAD_BYTES
from demo.app_pages import archive, turns_html
from demo.app_settings import Setting, connect
from demo.defaults import default_options
from demo.views import inside
from demo.views.draw import grader_html
from orthus.data.schema import Turn
from orthus.serving import Answer, Done
from orthus.streaming import ImagePreview, TextPiece

PROMPT = "a photo of a red circle above two blue stars"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(server.url, verbose=False, download_files=str(tmp_path_factory.mktemp("client")))


def post(server: Server, value: Any, fn_index: int = 0) -> httpx.Response:
    body = {"data": value, "fn_index": fn_index, "session_hash": "test"}
    return httpx.post(f"{server.url}gradio_api/queue/join", json=body)


def texts(answer: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in answer["segments"] if "text" in part)


# Clients


def test_a_client_gets_text_about_a_picture(client: Client) -> None:
    said, pictures = client.predict("Describe the picture.", handle_file(str(PICTURE)), "chat", api_name="/generate")
    assert "star red" in texts(said) and said["finish_reason"] == "stop" and pictures == []


def test_a_client_gets_a_picture_while_it_is_drawn(client: Client) -> None:
    job = client.submit(PROMPT, None, "draw", 3, api_name="/generate")
    said, pictures = job.result(60)
    with Image.open(pictures[0]["image"]) as picture:
        assert picture.size == (64, 64)
    shares = [part["share"] for answer, _ in job.outputs() for part in answer["segments"] if "share" in part]
    assert len(set(shares)) > 1 and shares == sorted(shares) and shares[-1] == 1.0
    again, same = client.predict(PROMPT, None, "draw", 3, api_name="/generate")
    assert again == said and Path(same[0]["image"]).read_bytes() == Path(pictures[0]["image"]).read_bytes()


def test_a_client_gets_an_edit_and_a_story(client: Client) -> None:
    said, pictures = client.predict("make the star blue", handle_file(str(PICTURE)), "edit", api_name="/generate")
    assert "star blue" in texts(said) and len(pictures) == 1
    said, pictures = client.predict(
        "Tell a story with pictures: count red stars up to three.", None, "story", api_name="/generate"
    )
    kinds = ["picture" if "picture" in part else "text" for part in said["segments"]]
    assert kinds == ["text", "picture"] * 3 and len(pictures) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", None, "chat"), "Give text"),
        (("make it blue", None, "edit"), "an edit needs both"),
        (("x", None, "draw", -1), "seed"),
        (("x", None, "draw", 0, -5), "guidance"),
        (("x " * 15_000, None, "chat"), "shorten it"),
    ],
)
def test_a_client_is_told_what_is_wrong(client: Client, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(Exception, match=message):
        client.predict(*arguments, api_name="/generate")


def test_uploads_are_judged_before_they_are_decoded(client: Client, tmp_path: Path) -> None:
    Image.new("1", (5000, 5000)).save(tmp_path / "bomb.png")
    cut = PICTURE.read_bytes()[:600]
    (tmp_path / "cut.png").write_bytes(cut)
    for name, message in (("bomb.png", "pixels"), ("cut.png", "damaged")):
        with pytest.raises(Exception, match=message):
            client.predict("Describe the picture.", handle_file(str(tmp_path / name)), "chat", api_name="/generate")


# What is refused


@pytest.mark.parametrize(
    "file",
    [
        {"path": str(ROOT / "pyproject.toml")},
        {"path": "/etc/passwd"},
        {"path": "pyproject.toml"},
        {"path": "../../etc/passwd"},
        {"path": "http://127.0.0.1:1/picture.png"},
        {"path": "file:///etc/passwd"},
        {"path": "x\0y"},
        {"path": None, "url": "data:image/png;base64,AAAA"},
    ],
)
def test_no_path_and_no_address_of_a_request_is_opened(server: Server, file: dict[str, Any]) -> None:
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
        response = post(server, ["x", {**file, **meta}, "chat", 0, 0, 0])
        assert response.status_code == 400 and "upload it instead" in response.json()["detail"]


def test_a_path_out_of_the_upload_folder_is_refused(server: Server) -> None:
    inside = str(server.folder / "a" / ".." / ".." / "secret.png")
    assert post(server, [{"path": inside}]).status_code == 400
    for name in ("/etc/passwd", str(ROOT / "pyproject.toml"), "http://127.0.0.1:1/x", inside):
        assert httpx.get(f"{server.url}gradio_api/file={name}").status_code in (400, 403, 404), name
    assert httpx.get(f"{server.url}gradio_api/proxy=http://127.0.0.1:1/x").status_code == 400


@pytest.mark.parametrize("name", ["Content-Type", "Content-Length", "Host", "Origin"])
def test_repeated_headers_are_refused(server: Server, name: str) -> None:
    body = json.dumps({"data": ["what is it", {"path": str(PICTURE)}, "chat", 0, 0, 0]}).encode()
    host = server.url.removeprefix("http://").rstrip("/")
    known = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    again = {**known, "Content-Type": "multipart/form-data", "Origin": server.url}[name]
    lines = [*known.items(), (name, again), *([(name, again)] if name == "Origin" else [])]
    head = "".join(f"{key}: {value}\r\n" for key, value in lines)
    answer = sent(server, f"POST /gradio_api/call/generate HTTP/1.1\r\n{head}\r\n".encode() + body)
    assert answer.startswith(b"HTTP/1.1 400"), answer[:200]


def test_only_the_route_of_uploads_takes_uploads(server: Server) -> None:
    body = json.dumps({"data": [{"path": str(PICTURE)}]}).encode()
    for path in ("call/generate", "queue/join", "process_recording", "upload/", "upload"):
        response = httpx.post(
            f"{server.url}gradio_api/{path}", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert response.status_code == 400, path


def test_every_place_that_opens_a_picture_checks_its_path(server: Server, tmp_path: Path) -> None:
    """`AppGuard` is the first lock, these are the second; Gradio's own depends on what a request says."""
    folder = Folder(tmp_path / "in")
    folder.path.mkdir()
    (folder.path / "link.png").symlink_to(PICTURE)
    part = picture_input(folder)
    desk = Desk(server.engine, Settings(), folder)
    for path in (str(PICTURE), str(folder.path / "link.png"), f"{folder.path}/../x.png", "x.png", "http://127.0.0.1:1/x.png"):
        with pytest.raises(gr.Error, match="not uploaded here"):
            desk.read(path)
        with pytest.raises(gr.Error, match="not uploaded here"):
            part.preprocess(ImageData(path=path))
    stored = folder.path / "a.png"
    stored.write_bytes(PICTURE.read_bytes())
    assert desk.read(part.preprocess(ImageData(path=str(stored)))).size == (64, 64)  # type: ignore[arg-type]


def test_pages_of_other_sites_do_not_call_it(server: Server) -> None:
    url, body = f"{server.url}gradio_api/call/generate", {"data": ["x", None, "chat", 0, 0, 0]}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert httpx.post(url, json=body, headers=headers).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    page = httpx.get(server.url, headers=link)
    assert page.status_code == 200 and page.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    assert httpx.get(f"{server.url}config", headers=link).status_code == 403


def sent(server: Server, request: bytes) -> bytes:
    """The answer to raw bytes, as far as the server sends it within 10 s."""
    host, port = server.url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        return connection.recv(65536)


def test_slow_bodies_and_many_requests_end(tmp_path: Path) -> None:
    with served(tmp_path, token="0123456789abcdef", body_seconds=0.5) as server:
        head = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        began = time.monotonic()
        assert b" 401 " in sent(server, b"POST /gradio_api/queue/join HTTP/1.1\r\n" + head)  # nothing is read before the password
        assert b" 408 " in sent(server, b"POST /login HTTP/1.1\r\n" + head)
        assert time.monotonic() - began < 8
        host, port = server.url.removeprefix("http://").rstrip("/").split(":")
        with contextlib.ExitStack() as stack:
            for place in range(MAX_OPEN):
                connection = stack.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(f"GET /gradio_api/heartbeat/{place} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
                if place % 16 == 0:
                    connection.recv(1)
            connection.recv(1)
            assert httpx.get(server.url).status_code == 429 and httpx.get(f"{server.url}health").status_code == 200


def test_broken_uploads_and_other_files_leave_nothing(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(server.folder.rglob("*"))
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    host, port = server.url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + b"Content-Length: 9000000\r\n\r\n" + part + b"y" * 1_000_000)
    response = httpx.post(f"{server.url}gradio_api/upload", files={"files": ("a.png", b"<script>", "text/html")})
    assert response.status_code == 400 and "not PNG" in response.json()["detail"]
    assert set(server.folder.rglob("*")) == before and capfd.readouterr().err == ""


def test_old_files_go_and_those_of_the_page_stay(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for name, age in (("page", 900), ("old", 500), ("a", 30), ("b", 20), ("c", 10)):
        (tmp_path / name).write_bytes(b"0" * 100)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
        if name == "page":
            folder.keep()
    folder.sweep(seconds=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "page"]
    folder.sweep(seconds=100, max_bytes=150)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "page"]


def test_large_and_malformed_bodies_are_refused(server: Server) -> None:
    url = f"{server.url}gradio_api/queue/join"
    assert httpx.post(url, content=b"[" * (MAX_BODY_BYTES + 1)).status_code == 413
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.post(url, content=b"[" * 100_000).status_code == 400
    files = {"files": ("a.png", b"0" * (MAX_UPLOAD_BYTES + 1))}
    assert httpx.post(f"{server.url}gradio_api/upload", files=files).status_code == 413
    assert httpx.post(f"{server.url}gradio_api/upload", files={"files": ("a.png", b"0" * 11_000_000)}).status_code == 413
    assert httpx.get(server.url).status_code == 200


def test_a_page_of_another_name_does_not_reach_it(server: Server) -> None:
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    with served(tmp_path, token="0123456789abcdef") as server:
        assert httpx.get(f"{server.url}config").status_code == 401
        wrong = httpx.post(f"{server.url}login", data={"username": "me", "password": "wrong"})
        right = httpx.post(f"{server.url}login", data={"username": "me", "password": "0123456789abcdef"})
        assert (wrong.status_code, right.status_code) == (400, 200)
        assert httpx.get(f"{server.url}config", cookies=right.cookies).status_code == 200


def test_only_the_one_endpoint_is_public(client: Client) -> None:
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/generate"]


# Pages


def test_every_input_has_a_name_and_nothing_is_fetched(server: Server) -> None:
    config = httpx.get(f"{server.url}config").json()
    inputs = ("textbox", "number", "slider", "dropdown", "checkbox", "image", "multimodaltextbox")
    parts = [part for part in config["components"] if part["type"] in inputs]
    assert len(parts) > 15 and all(part["props"].get("label") for part in parts)
    assert not config.get("stylesheets")
    page = httpx.get(server.url).text
    assert "fonts.googleapis" not in page and "cdnjs" not in page


def test_settings_of_an_address_are_checked_when_the_app_is_built() -> None:
    with gr.Blocks() as blocks:
        number = gr.Slider(0, 5, 1, step=1, label="n")
        spec = {"name": "n", "value": 1, "kind": "number", "low": 0, "high": 5, "whole": True}
        assert Setting("n", number).spec() == spec
        with pytest.raises(ValueError, match="named twice"):
            connect(blocks, [Setting("n", number), Setting("n", number)])
        with pytest.raises(TypeError, match="Image"):
            Setting("p", gr.Image()).spec()


def test_a_draft_grows_and_keeps_what_is_whole() -> None:
    draft, picture = Draft(), Image.new("RGB", (8, 8))
    for event in (TextPiece(0, "a red"), TextPiece(0, " star"), ImagePreview(0, 0, 2, False, picture)):
        draft.hear(event, 4)
    assert draft.parts[0] == "a red star" and draft.parts[1].share == 0.5 and draft.segments == ("a red star",)  # type: ignore[union-attr]
    draft.hear(Done(Answer((), "cancelled", 1, 2, 0.1, 0.0)), 4)
    assert draft.is_stopped and outcome([draft]) == "Stopped" and draft.segments == ("a red star",)


def test_a_conversation_is_kept_as_html_markdown_and_pictures() -> None:
    picture = Image.new("RGB", (8, 8), (200, 0, 0))
    turns = [Turn("user", (picture, "<script>alert(1)</script> [x](y)")), Turn("assistant", ("It is *red*.", picture))]
    with zipfile.ZipFile(io.BytesIO(archive("A <title>", turns))) as files:
        assert sorted(files.namelist()) == ["index.html", "index.md", "picture-1.png", "picture-2.png"]
        page, notes = files.read("index.html").decode(), files.read("index.md").decode()
        with Image.open(io.BytesIO(files.read("picture-2.png"))) as kept:
            assert kept.getpixel((0, 0)) == (200, 0, 0)
    assert "<script>" not in page and "http" not in page and page.count("data:image/png;base64,") == 2
    assert "\\[x\\]" in notes and "(picture-2.png)" in notes and "<script>" not in notes
    assert 'width="192" height="192"' in turns_html(turns)


def test_the_graders_boxes_are_over_the_picture() -> None:
    with Image.open(PICTURE) as picture:
        shown = grader_html(picture)
    assert "red star" in shown and shown.count("<rect") == 4 and "green square" in shown


# Who runs what


def test_jobs_of_one_client_do_not_end_each_other(client: Client) -> None:
    jobs = [client.submit(PROMPT, None, "draw", seed, api_name="/generate") for seed in range(3)]
    assert [job.result(60)[0]["finish_reason"] for job in jobs] == ["stop"] * 3


def test_the_limit_per_user_counts_addresses(server: Server) -> None:
    desk, turns = Desk(server.engine, Settings(), Folder(server.folder)), [Turn("user", (PROMPT,))]

    def run(page: str | None, address: str, tab: str = "draw", **options: Any) -> Any:
        request: Any = SimpleNamespace(session_hash=page, client=SimpleNamespace(host=address))
        return request, desk.run(request, tab, [(turns, default_options("draw", desk.processor))], **options)

    pages: list[str | None] = ["a", "b", "", None]
    runs = [run(page, "10.0.0.1") for page in pages]
    for _, progress in runs:
        next(progress)
    with pytest.raises(gr.Error, match="Try again"):
        next(run("e", "10.0.0.1")[1])
    _, other = run("a", "10.0.0.2", "story")
    next(other)
    for request, _ in runs:
        desk.stop(request, "draw")
    finished = [list(progress)[-1].drafts[0].is_stopped for _, progress in (*runs, (None, other))]
    assert finished == [True, True, False, False, False]  # without a name nothing is stopped, and no other tab is


def test_looking_inside_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "WAIT_SECONDS", 0.01)
    free = threading.Semaphore(1)
    with inside._turn(free), pytest.raises(gr.Error, match="look inside just now"), inside._turn(free):
        pass
    with inside._turn(free):
        pass


def test_what_is_refused_is_told_and_not_logged(client: Client, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("x", None, "my secret", 0), "my secret"),
        (("x", None, "chat", None), "seed must be a whole number"),
        (("my secret\x00", None, "chat", 0), "control character"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, api_name="/generate")
    config = httpx.get(f"{server.url}config").json()
    kinds = {part["id"]: part["type"] for part in config["components"]}
    tab = next(
        entry
        for entry in config["dependencies"]
        if [kinds[i] for i in entry["inputs"]] == ["textbox", "slider", "slider", "number"]
    )
    for values, message in (
        ([None, 2, 4, 0], "Write what to tell"),
        (["x", None, 4, 0], "is empty"),
        (["x", 2, 4, None], "seed must"),
    ):
        assert post(server, values, tab["id"]).status_code == 200
        assert message in httpx.get(f"{server.url}gradio_api/queue/data?session_hash=test", timeout=20).text
    assert capfd.readouterr().err == ""
