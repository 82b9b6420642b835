"""The app through its Gradio endpoint, what it refuses, and the parts of its pages."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from app_server import PICTURE, ROOT, Server, served
from gradio.context import LocalContext
from gradio.exceptions import InvalidPathError
from gradio.processing_utils import _check_allowed
from gradio_client import Client, handle_file
from PIL import Image

from demo.app_desk import Draft, outcome
from demo.app_guard import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, AppGuard
from demo.app_pages import archive, turns_html
from demo.app_settings import Setting, connect
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
    (tmp_path / "text.png").write_text("no picture")
    cut = PICTURE.read_bytes()[:600]
    (tmp_path / "cut.png").write_bytes(cut)
    for name, message in (("bomb.png", "pixels"), ("text.png", "not PNG"), ("cut.png", "damaged")):
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
    response = post(server, ["x", {**file, "meta": {"_type": "gradio.FileData"}}, "chat", 0, 0, 0])
    assert response.status_code == 400 and "upload it instead" in response.json()["detail"]


def test_a_path_out_of_the_upload_folder_is_refused(server: Server) -> None:
    inside = str(server.folder / "a" / ".." / ".." / "secret.png")
    assert post(server, [{"path": inside}]).status_code == 400
    for name in ("/etc/passwd", str(ROOT / "pyproject.toml"), "http://127.0.0.1:1/x", inside):
        assert httpx.get(f"{server.url}gradio_api/file={name}").status_code in (400, 403, 404), name
    assert httpx.get(f"{server.url}gradio_api/proxy=http://127.0.0.1:1/x").status_code == 400


def test_gradio_itself_checks_paths_too(server: Server) -> None:
    """`AppGuard` is the first of two locks; where an app is mounted Gradio leaves its own open unless told otherwise."""
    blocks = server.app.state.blocks
    LocalContext.blocks.set(blocks)
    with pytest.raises(InvalidPathError):
        _check_allowed("/etc/passwd", True)
    blocks.has_launched = False
    try:
        _check_allowed("/etc/passwd", True)  # as it is without `create_app`'s line; should this raise one day, drop the line
    finally:
        blocks.has_launched = True
        LocalContext.blocks.set(None)


def test_large_and_malformed_bodies_are_refused(server: Server) -> None:
    url = f"{server.url}gradio_api/queue/join"
    assert httpx.post(url, content=b"[" * (MAX_BODY_BYTES + 1)).status_code == 400
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.post(url, content=b"[" * 100_000).status_code == 400
    files = {"files": ("a.png", b"0" * (MAX_UPLOAD_BYTES + 1))}
    assert httpx.post(f"{server.url}gradio_api/upload", files=files).status_code == 400
    assert httpx.post(f"{server.url}gradio_api/upload", files={"files": ("a.png", b"0" * 11_000_000)}).status_code == 413
    assert httpx.get(server.url).status_code == 200


def test_a_page_of_another_name_does_not_reach_it(server: Server) -> None:
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 400


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


def test_a_guard_lets_uploads_and_the_api_pass(tmp_path: Path) -> None:
    guard = AppGuard(None, tmp_path, (), lambda: False)
    (tmp_path / "a.png").write_bytes(b"")
    body = {"data": [{"path": str(tmp_path / "a.png"), "url": "http://x/file=a"}]}
    assert guard._refused_body(json.dumps(body).encode()) is None
    assert guard._refused_path(f"/gradio_api/file={tmp_path}/a.png") is None
