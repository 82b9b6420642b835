"""`demo.load` and a real server: its own process, the shipped checkpoint, the official client, SIGTERM."""

import argparse
import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from demo import load
from demo.load import Reply, num_telling, reply_of, requests_of

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "orthus-small"
needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint")


def reply(value: int, text: str = "a") -> Reply:
    return Reply((text,), (np.full((2, 2, 3), value, np.int16),))


def test_differences_of_replies() -> None:
    assert reply(5).difference(reply(5)) == 0 and reply(5).difference(reply(9)) == 4
    assert reply(5).difference(reply(5, "b")) == 256 and reply(5).difference(Reply(("a",), ())) == 256
    requests = requests_of(1)
    assert num_telling(dict(zip(requests, [reply(5), reply(6), reply(50)], strict=False)), 2) == 1


def test_replies_of_both_shapes() -> None:
    picture = load.PICTURE.read_bytes()
    text = load.base64.b64encode(picture).decode()
    drawn = reply_of({"data": [{"b64_json": text, "revised_prompt": None}]})
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]
    said = reply_of({"choices": [{"message": {"content": parts}}, {"message": {"content": "b"}}]})
    assert drawn.texts == ("",) and said.texts == ("a", "b") and np.array_equal(drawn.pictures[0], said.pictures[0])


def test_crossed_lost_and_refused_answers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of(1)[:1]
    answers: list[Any] = [
        (200, {"choices": [{"message": {"content": "mine"}}]}, 0.0),
        (200, {"choices": [{"message": {"content": "somebody's"}}]}, 0.0),
        (429, {"error": {"message": "full"}}, 0.0),
        (500, {}, 0.0),
        ConnectionResetError("gone"),
    ]

    def post(*values: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(load, "post", post)
    tally = load.Tally(2)
    load.client(0, {requests[0]: Reply(("mine",), ())}, tally, threading.Event(), 0)
    assert tally.statuses == {"200": 2, "429": 1, "500": 1} and len(tally.wrong) == 1
    assert len(tally.lost) == 2 and "without an error in words" in tally.lost[0] and "gone" in tally.lost[1]


@needs_checkpoint
def test_a_real_server_answers_and_stops_in_order() -> None:
    args = argparse.Namespace(checkpoint=str(CHECKPOINT), max_rows=4, max_waiting=4, clients=6)
    process, port = load.start(args)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        drawn = client.images.generate(model="orthus-small", prompt="a photo of a red circle", extra_body={"seed": 1})
        assert drawn.data and "circle red" in (drawn.data[0].revised_prompt or "")
        chunks = client.chat.completions.create(
            model="orthus-small", messages=[{"role": "user", "content": "a photo of a red circle"}], stream=True, seed=1
        )
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "circle red" in "".join(delta.content or "" for delta in deltas)
        assert sum(len(getattr(delta, "images", ())) for delta in deltas) == 1
        with pytest.raises(openai.BadRequestError, match="512"):
            client.chat.completions.create(model="orthus-small", messages=[{"role": "user", "content": "a " * 600}])
        expected = {request: reply_of(load.post(port, request)[1]) for request in requests_of(1)[:3]}
        tally, threads = load.crowd(port, expected, argparse.Namespace(tolerance=2, clients=6), threading.Event())
        threading.Event().wait(1.0)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 0 and not any(map(threading.Thread.is_alive, threads))
        assert tally.statuses and not tally.lost and not tally.wrong
    finally:
        process.kill()


@needs_checkpoint
@pytest.mark.slow
def test_load(tmp_path: Path) -> None:
    assert load.main(["--seconds", "60", "--output", str(tmp_path / "load.json")]) == 0
    report = json.loads((tmp_path / "load.json").read_text())
    assert report["times_alone"] > 2 and report["load"]["statuses"]["429"] > 0 and report["telling"] > 12
