"""The HTTP API: OpenAI's shapes, streams, limits, and the official client against a real server."""

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn
from fake_engine import SIZE, FakeEngine, color_of
from fastapi.testclient import TestClient
from PIL import Image

from demo.api import create_api
from demo.api_settings import Settings
from demo.defaults import default_options, says_first
from demo.serve import PatientProtocol, Server
from orthus.serving import Options

TOKEN = "a token of the tests"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(max_waiting=8, max_per_user=4)


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with TestClient(create_api(engine, Settings(model_name="fake"))) as client:
        yield client


@contextlib.contextmanager
def serving(engine: FakeEngine, settings: Settings) -> Iterator[tuple[str, Server]]:
    """A real server in a thread, with a port of its own."""
    app = create_api(engine, settings)
    config = uvicorn.Config(
        app, port=0, http=PatientProtocol, log_level="error", proxy_headers=False, timeout_graceful_shutdown=5
    )
    server = Server(config, engine, app, 2.0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def official() -> Iterator[openai.OpenAI]:
    with serving(FakeEngine(), Settings(model_name="fake", token=TOKEN)) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}


def png(color: tuple[int, int, int] = (250, 0, 0), size: tuple[int, int] = (20, 10), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def pixel(part: str) -> Any:
    """The first pixel of a base64 PNG or of its data: URI."""
    picture = Image.open(io.BytesIO(base64.b64decode(part.rpartition(",")[2])))
    assert picture.size == (SIZE, SIZE)
    return picture.getpixel((0, 0))


# Shapes


def test_a_text_answer_is_a_string(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=ask("abc")).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "fake"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "cba", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 7


def test_pictures_come_as_parts_in_reading_order(client: TestClient) -> None:
    content = client.post("/v1/chat/completions", json=ask("draw it", seed=3)).json()["choices"][0]["message"]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"]
    assert pixel(content[1]["image_url"]["url"]) == color_of("draw it", 3)


def test_an_answer_can_be_sent_back(client: TestClient, engine: FakeEngine) -> None:
    first = ask("draw it", seed=3)
    message = client.post("/v1/chat/completions", json=first).json()["choices"][0]["message"]
    again = {**first, "messages": [*first["messages"], {**message, "tool_calls": None}, {"role": "user", "content": "and?"}]}
    assert client.post("/v1/chat/completions", json=again).status_code == 200
    turns = engine.requests[-1][0]
    assert [turn.role for turn in turns] == ["user", "assistant", "user"] and isinstance(turns[1].segments[1], Image.Image)


def test_n_answers_are_jobs_with_seeds_of_their_own(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "a", "n": 3, "seed": 5, "size": "8x8"}).json()
    assert [pixel(item["b64_json"]) for item in answer["data"]] == [color_of("a", seed) for seed in (5, 6, 7)]
    assert answer["data"][0]["revised_prompt"] == "a" and answer["seed"] == 5
    choices = client.post("/v1/chat/completions", json=ask("ab", n=2)).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]


def test_without_a_seed_answers_differ_and_say_theirs(client: TestClient) -> None:
    first, second = (client.post("/v1/images/generations", json={"prompt": "a"}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert pixel(first["data"][0]["b64_json"]) == color_of("a", first["seed"])


def test_fields_become_options(client: TestClient, engine: FakeEngine) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "guidance": 4, "guidance_interval": [0.1, 0.5], "max_images": 2}
    client.post("/v1/chat/completions", json=ask("a", **fields, seed=1, preview_every=2, user="me", stop=None))
    options = engine.requests[-1][1]
    assert (options.do_sample, options.temperature, options.top_p, options.max_new_tokens) == (True, 0.5, 0.9, 9)
    assert (options.guidance, options.guidance_interval, options.max_images, options.preview_every) == (4, (0.1, 0.5), 2, 2)
    client.post("/v1/chat/completions", json=ask("a", temperature=0, modality="text"))
    assert not engine.requests[-1][1].do_sample and engine.requests[-1][1].guidance == 1.0
    client.post("/v1/chat/completions", json=ask("a", temperature=1e-40, top_p=0.5))
    assert not engine.requests[-1][1].do_sample
    client.post("/v1/chat/completions", json=ask("a", top_p=0.5))
    assert (engine.requests[-1][1].do_sample, engine.requests[-1][1].temperature) == (True, 1.0)
    assert client.post("/v1/chat/completions", json=ask("a", max_completion_tokens=3)).status_code == 200
    assert engine.requests[-1][1].max_new_tokens == 3


def test_drawing_has_the_defaults_that_draw_well(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/images/generations", json={"prompt": "a", "seed": 0})
    assert engine.requests[-1][1] == default_options("draw", engine.processor)
    assert says_first(engine.processor) and engine.requests[-1][1].text_guidance == 3.0
    client.post("/v1/images/generations", json={"prompt": "a", "seed": 0, "modality": "image", "guidance": 5.5})
    options = engine.requests[-1][1]
    assert (options.modality, options.force_image, options.guidance) == ("image", False, 5.5)


def test_checkpoints_of_others_draw_at_once(engine: FakeEngine) -> None:
    from types import SimpleNamespace

    published: Any = SimpleNamespace(separator_token="<reserved08706>", guidance=5.0, interleaved_guidance=3.0)
    assert default_options("draw", published) == Options(modality="image", guidance=5.0, max_images=1)
    assert default_options("chat", published) == Options(guidance=3.0)
    with pytest.raises(ValueError, match="'paint' is not one of chat, draw"):
        default_options("paint", published)


def test_an_edit_sends_picture_and_text(client: TestClient, engine: FakeEngine) -> None:
    files = {"image": ("../../etc/passwd", png(), "text/plain")}
    answer = client.post("/v1/images/edits", files=files, data={"prompt": "a", "seed": "2", "n": "1", "guidance": "3.5"})
    assert answer.status_code == 200 and pixel(answer.json()["data"][0]["b64_json"]) == color_of("a", 2)
    turns, options, _ = engine.requests[-1]
    picture = turns[0].segments[0]
    assert isinstance(picture, Image.Image) and picture.size == (SIZE, SIZE) and picture.getpixel((0, 0)) == (250, 0, 0)
    assert (options.image_guidance, options.guidance) == (1.0, 3.5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_are_told_by_content(client: TestClient, engine: FakeEngine, kind: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": uri(png(format=kind, size=(40, 30)))}}, {"type": "text", "text": "a"}]
    assert client.post("/v1/chat/completions", json=ask(parts)).status_code == 200, kind  # type: ignore[arg-type]


def test_exif_turns_the_picture_and_is_gone(client: TestClient, engine: FakeEngine) -> None:
    tall = Image.new("RGB", (SIZE, SIZE), (0, 0, 0))
    tall.paste((255, 255, 255), (0, 0, SIZE, SIZE // 2))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 3, "where I live"
    buffer = io.BytesIO()
    tall.save(buffer, "JPEG", exif=exif, quality=95)
    client.post("/v1/images/edits", files={"image": buffer.getvalue()}, data={"prompt": "a"})
    picture = engine.requests[-1][0][0].segments[0]
    assert isinstance(picture, Image.Image) and picture.getpixel((2, 0))[0] < 20 < 230 < picture.getpixel((2, SIZE - 1))[0]  # type: ignore[index]
    assert not picture.info and not picture.getexif()


def test_models_health_and_metrics(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
    assert client.get("/v1/models/fake").json()["object"] == "model" and client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json()["status"] == "ok"
    client.post("/v1/chat/completions", json=ask("a"))
    text = client.get("/metrics").text
    assert 'orthus_http_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "orthus_engine_served_total" in text and "orthus_engine_waiting 0.0" in text


def test_every_response_has_security_headers(client: TestClient) -> None:
    responses = [client.get("/health"), client.get("/v1/nothing"), client.get("/nothing"), client.post("/v1/chat/completions")]
    for response in [*responses, client.post("/v1/images/generations", json={"prompt": "a"}), client.get("/metrics")]:
        assert response.headers["x-content-type-options"] == "nosniff", response.url
        assert "default-src 'none'" in response.headers["content-security-policy"], response.url
        assert "server" not in response.headers


# Streams


def frames(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_of_chat(client: TestClient) -> None:
    body = ask("draw me", stream=True, seed=4, preview_every=2, stream_options={"include_usage": True})
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = frames(response.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and "".join(delta.get("content", "") for delta in deltas) == "em ward"
    shown = [delta["images"][0] for delta in deltas if "images" in delta]
    assert [(part["num_drawn"], part["is_final"]) for part in shown] == [(2, False), (4, True)]
    assert pixel(shown[-1]["image_url"]["url"]) == color_of("draw me", 4)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and usage["usage"]["completion_tokens"] == 7


def test_a_stream_of_several_answers_keeps_them_apart(client: TestClient) -> None:
    chunks = frames(client.post("/v1/chat/completions", json=ask("abcdefgh", stream=True, n=3)).text)
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "hgfedcba"
        assert mine[-1]["finish_reason"] == "stop"


def test_a_stream_of_pictures(client: TestClient) -> None:
    response = client.post("/v1/images/generations", json={"prompt": "a", "stream": True, "partial_images": 1, "seed": 1})
    events = frames(response.text)
    assert [event["type"] for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert pixel(events[-1]["b64_json"]) == color_of("a", 1)


def test_failures_are_told_and_say_nothing_of_the_prompt(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    response = client.post("/v1/chat/completions", json=ask("crash"))
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    streamed = client.post("/v1/chat/completions", json=ask("crash", stream=True))
    assert frames(streamed.text)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text + caplog.text


def test_what_nobody_foresaw_is_a_500_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.submit_all = lambda *values: {}["secret prompt"]  # type: ignore[method-assign, assignment]
    with TestClient(create_api(engine, Settings())) as client:
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert "KeyError in" in caplog.text and "secret" not in caplog.text + response.text


# Limits


def test_the_queue_answers_429_and_when_to_come_back() -> None:
    engine = FakeEngine(max_waiting=2, max_per_user=1)
    with TestClient(create_api(engine, Settings(max_n=4))) as client:
        two = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "slow"}], "n": 2})
        assert two.status_code == 429 and two.headers["retry-after"] == "2"
        assert two.json()["error"]["code"] == "too_many_requests"
        assert not engine.jobs, "all of them or none"
        engine.max_waiting = 0
        full = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert full.status_code == 429 and full.headers["retry-after"] == "3" and full.json()["error"]["code"] == "queue_full"


def test_a_request_has_a_time_limit() -> None:
    engine = FakeEngine()
    with TestClient(create_api(engine, Settings(max_seconds=0.1))) as client:
        body = {"messages": [{"role": "user", "content": "slow"}]}
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        assert frames(client.post("/v1/chat/completions", json={**body, "stream": True}).text)[-1]["error"]["code"] == "timeout"
    assert all(job.is_cancelled for job in engine.jobs)


@pytest.mark.parametrize("is_stream", [False, True])
def test_hanging_up_cancels_the_job(is_stream: bool) -> None:
    engine = FakeEngine()
    with serving(engine, Settings()) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            for _ in client.chat.completions.create(
                model="orthus", messages=[{"role": "user", "content": "slow"}], stream=is_stream
            ):
                pass
        wait_for(lambda: engine.jobs[0].is_over)
        assert engine.jobs[0].is_cancelled


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_stopping_ends_every_request_with_an_answer_or_an_error() -> None:
    engine = FakeEngine()
    results: list[int] = []
    with serving(engine, Settings()) as (url, server):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def work() -> None:
            try:
                client.chat.completions.create(model="orthus", messages=[{"role": "user", "content": "slow"}])
            except openai.InternalServerError as error:
                results.append(error.status_code)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(engine.jobs) == 3)
        server.should_exit = True
        for thread in threads:
            thread.join(10)
    assert results == [503, 503, 503]


def test_while_it_stops_new_requests_are_refused() -> None:
    app = create_api(FakeEngine(), Settings())
    with TestClient(app) as client:
        app.state.api.is_closing = True
        response = client.post("/v1/images/generations", json={"prompt": "a"})
        assert response.status_code == 503 and response.headers["retry-after"] and client.get("/health").status_code == 503


def test_a_client_that_does_not_read_is_dropped() -> None:
    """Against the guard itself: the transport never takes what it is given."""
    engine = FakeEngine()
    app = create_api(engine, Settings(send_seconds=0.05))
    body = json.dumps(ask("draw", model=None, stream=True)).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.sleep(60)

    async def send(message: Any) -> None:
        await asyncio.sleep(0 if message["type"] == "http.response.start" else 60)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "http_version": "1.1",
             "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "root_path": ""}  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    wait_for(lambda: engine.jobs[0].is_over)


# The official client


def test_official_client_text_and_interleaved(official: openai.OpenAI) -> None:
    answer = official.chat.completions.create(model="fake", messages=[{"role": "user", "content": "abc"}], seed=1)
    assert answer.choices[0].message.content == "cba" and answer.usage and answer.usage.completion_tokens == 7
    question: Any = [{"type": "image_url", "image_url": {"url": uri(png())}}, {"type": "text", "text": "draw"}]
    own = {"guidance": 2.0, "max_images": 1}
    answer = official.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": question}], seed=1, extra_body=own
    )
    content: Any = answer.choices[0].message.content
    assert content[0]["text"] == "ward" and pixel(content[1]["image_url"]["url"]) == color_of("draw", 1)
    said = answer.choices[0].message.model_dump(warnings=False)
    messages: Any = [{"role": "user", "content": question}, said, {"role": "user", "content": "b"}]
    assert official.chat.completions.create(model="fake", messages=messages).choices[0].message.content == "b"


def test_official_client_streams_chat(official: openai.OpenAI) -> None:
    text, pictures = "", []
    stream = official.chat.completions.create(model="fake", messages=[{"role": "user", "content": "draw"}], seed=1, stream=True)
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        pictures += getattr(chunk.choices[0].delta, "images", [])
    assert text == "ward" and pixel(pictures[-1]["image_url"]["url"]) == color_of("draw", 1)


def test_official_client_draws_and_edits(official: openai.OpenAI) -> None:
    drawn = official.images.generate(model="fake", prompt="a", n=2, extra_body={"seed": 3})
    assert drawn.data and pixel(drawn.data[1].b64_json or "") == color_of("a", 4)
    edited = official.images.edit(model="fake", image=("x.png", png()), prompt="b", extra_body={"seed": 3})
    assert edited.data and pixel(edited.data[0].b64_json or "") == color_of("b", 3)


def test_official_client_streams_pictures(official: openai.OpenAI) -> None:
    events: list[Any] = list(
        official.images.generate(model="fake", prompt="a", stream=True, partial_images=1, extra_body={"seed": 3})
    )
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert pixel(events[-1].b64_json) == color_of("a", 3) and events[-1].usage.output_tokens == 7
    events = list(official.images.edit(model="fake", image=png(), prompt="a", stream=True, extra_body={"seed": 3}))
    assert [event.type for event in events] == ["image_edit.completed"] and pixel(events[0].b64_json) == color_of("a", 3)


def test_official_client_hears_errors(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["fake"]
    with pytest.raises(openai.BadRequestError, match="control character") as caught:
        official.chat.completions.create(model="fake", messages=[{"role": "user", "content": "a\x00b"}])
    assert caught.value.code == "control_character" and caught.value.param == "messages.0.content.0"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        official.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.AuthenticationError):
        official.with_options(api_key="a token of thieves").models.list()
    with pytest.raises(openai.APIError, match="failed"):
        list(official.chat.completions.create(model="fake", messages=[{"role": "user", "content": "crash"}], stream=True))
