"""Many clients at once against a server of its own: `python -m demo.load --seconds 300`.

A fixed set of requests is answered alone first, one at a time, which gives the answers to expect and the speed to compare with.
Then `--clients` threads send requests of the set, each answer is compared with the one that was given alone, and the server's
memory is watched. At last the server is told to stop under load: every request must end with its answer or an error in words.
"""

import argparse
import base64
import http.client
import io
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
PICTURE = Path(__file__).parent / "example.png"
COLORS = ("red", "blue", "green", "yellow")
SHAPES = ("circle", "star", "square")
TIMEOUT = 900.0
MAX_PAUSE = 5.0  # seconds that a client waits at most after 429, whatever it is told
TERM_AFTER = 3.0
Process = subprocess.Popen  # of bytes


@dataclass(frozen=True)
class Request:
    """One request of the set; `kind` for the report."""

    kind: str
    path: str
    body: bytes
    content_type: str = "application/json"


@dataclass
class Tally:
    """What clients saw. Shared by threads: `lock` guards it."""

    tolerance: int
    largest: int = 0  # difference of a pixel that was accepted
    answers: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def requests_of(num_seeds: int) -> list[Request]:
    """Drawings, answers, interleaved stories and edits: different prompts, each with several seeds."""
    found = []
    picture = PICTURE.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(picture).decode()
    for seed in range(num_seeds):
        for color, shape in zip(COLORS * 3, SHAPES * 4, strict=True):
            fields: dict[str, Any] = {"prompt": f"a photo of a {color} {shape}", "seed": seed}
            found.append(Request("draw", DRAW, json.dumps(fields).encode()))
        question = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Describe the picture."}]
        story = "Tell a story with pictures: count red stars up to three."
        found.append(_chat("answer", question, seed, modality="text", temperature=0.7))
        found.append(_chat("story", story, seed, force_image=True))
        found.append(_edit(picture, "make the star blue", seed))
    return found


def _chat(kind: str, content: Any, seed: int, **fields: Any) -> Request:
    body = {"messages": [{"role": "user", "content": content}], "seed": seed, **fields}
    return Request(kind, CHAT, json.dumps(body).encode())


def _edit(picture: bytes, prompt: str, seed: int) -> Request:
    parts = [b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % pair
             for pair in ((b"prompt", prompt.encode()), (b"seed", str(seed).encode()))]  # fmt: skip
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    body = b"".join(parts) + head + picture + b"\r\n--x--\r\n"
    return Request("edit", EDIT, body, "multipart/form-data; boundary=x")


@dataclass(frozen=True)
class Reply:
    """The words and pictures of an answer, without ids and times."""

    texts: tuple[str, ...]
    pictures: tuple[np.ndarray, ...]  # (H, W, 3)

    def difference(self, other: "Reply") -> int:
        """The largest difference of a pixel, 256 where words or the number of pictures differ."""
        if self.texts != other.texts or len(self.pictures) != len(other.pictures):
            return 256
        pairs = zip(self.pictures, other.pictures, strict=True)
        return max((int(np.abs(mine - its).max()) for mine, its in pairs), default=0)


def reply_of(answer: dict[str, Any]) -> Reply:
    texts, pictures = [], []
    for item in answer.get("data", ()):
        texts.append(item["revised_prompt"] or "")
        pictures.append(_pixels(item["b64_json"]))
    for choice in answer.get("choices", ()):
        content = choice["message"]["content"]
        parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
        pictures += [_pixels(part["image_url"]["url"].rpartition(",")[2]) for part in parts if part["type"] == "image_url"]
    return Reply(tuple(texts), tuple(pictures))


def _pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int16)


def num_telling(expected: dict[Request, Reply], tolerance: int) -> int:
    """How many requests have an answer that no other request has: where a crossed answer is seen for sure."""
    replies = list(expected.values())
    return sum(all(one is other or one.difference(other) > tolerance for other in replies) for one in replies)


def post(port: int, request: Request) -> tuple[int, dict[str, Any], float]:
    """Status, JSON body, seconds of Retry-After. Raises OSError and http.client.HTTPException for what is lost on the way."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("POST", request.path, request.body, {"Content-Type": request.content_type})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), float(response.headers.get("Retry-After", 0))
    finally:
        connection.close()


def alone(port: int, requests: Sequence[Request], expected: dict[Request, Reply]) -> dict[str, float]:
    """Each request once with nothing beside it; fills `expected`, or raises RuntimeError where an answer changed."""
    started = time.monotonic()
    for request in requests:
        status, answer, _ = post(port, request)
        if status != 200:
            raise RuntimeError(f"{request.kind} alone gave {status}: {answer}")
        if expected.setdefault(request, reply_of(answer)).difference(reply_of(answer)):
            raise RuntimeError(f"{request.kind} alone gave two different answers to {request.body[:80]!r}")
    seconds = time.monotonic() - started
    return {"answers": len(requests), "seconds": seconds, "answers_per_second": len(requests) / seconds}


def client(port: int, expected: dict[Request, Reply], tally: Tally, stop: threading.Event, seed: int) -> None:
    """One user: the next request as soon as the last is answered."""
    choose = random.Random(seed)
    requests = list(expected)
    while not stop.is_set():
        request = choose.choice(requests)
        started = time.monotonic()
        try:
            status, answer, pause = post(port, request)
        except ConnectionRefusedError:
            return  # the server is gone: the request was never accepted
        except (OSError, http.client.HTTPException, ValueError) as error:
            with tally.lock:
                tally.lost.append(f"{request.kind}: {type(error).__name__}: {error}")
            return
        with tally.lock:
            tally.statuses[str(status)] += 1
            if status == 200:
                tally.answers[request.kind] += 1
                tally.seconds.append(time.monotonic() - started)
                difference = expected[request].difference(reply_of(answer))
                if difference > tally.tolerance:
                    tally.wrong.append(f"{request.kind}, off by {difference}: {request.body[:80]!r}")
                else:
                    tally.largest = max(tally.largest, difference)
            elif "message" not in answer.get("error", {}):
                tally.lost.append(f"{request.kind}: {status} without an error in words")
        if status == 503:
            return  # the server stops, and has said so
        if status != 200:
            stop.wait(min(pause, MAX_PAUSE) * (0.5 + choose.random()))


def crowd(
    port: int, expected: dict[Request, Reply], args: argparse.Namespace, stop: threading.Event
) -> tuple[Tally, list[threading.Thread]]:
    tally, threads = Tally(args.tolerance), []
    for seed in range(args.clients):
        threads.append(threading.Thread(target=client, args=(port, expected, tally, stop, seed), daemon=True))
        threads[-1].start()
    return tally, threads


def resident(process_id: int) -> float:
    """Memory of a process in MB (Linux). Raises OSError where there is no /proc."""
    line = next(line for line in Path(f"/proc/{process_id}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def under_load(process: Process, port: int, expected: dict[Request, Reply], args: argparse.Namespace) -> dict[str, Any]:
    """All clients for `args.seconds`; throughput counts what was answered while they all were there."""
    stop = threading.Event()
    started = time.monotonic()
    tally, threads = crowd(port, expected, args, stop)
    memory: list[tuple[float, float]] = []
    while time.monotonic() - started < args.seconds:
        time.sleep(1.0)
        memory.append((round(time.monotonic() - started, 1), round(resident(process.pid), 1)))
    seconds = time.monotonic() - started
    with tally.lock:
        num_answers = sum(tally.answers.values())
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    tally.lost += ["a client never came back" for thread in threads if thread.is_alive()]
    steady = [size for second, size in memory if second >= seconds * args.warm_up] or [memory[-1][1]]
    mean = statistics.fmean(steady)
    ordered = sorted(tally.seconds) or [0.0]
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "answers": num_answers,
        "answers_per_second": num_answers / seconds,
        "answers_by_kind": dict(tally.answers),
        "statuses": dict(tally.statuses),
        "wrong": tally.wrong,
        "largest_difference": tally.largest,
        "lost": tally.lost,
        "latency_median": statistics.median(ordered),
        "latency_95": ordered[int(0.95 * (len(ordered) - 1))],
        "memory_mb_mean": round(mean, 1),
        "memory_spread_percent": round(100 * max(max(steady) - mean, mean - min(steady)) / mean, 2),
        "memory_mb": memory[:: max(1, len(memory) // 60)],
    }


def stopped_under_load(process: Process, port: int, expected: dict[Request, Reply], args: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM while all clients wait: what became of their requests, and how long the server took."""
    tally, threads = crowd(port, expected, args, threading.Event())
    time.sleep(TERM_AFTER)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(TIMEOUT)
    code = process.wait(TIMEOUT)
    lost = tally.lost + ["a client never came back" for thread in threads if thread.is_alive()]
    seconds = round(time.monotonic() - started, 2)
    return {"statuses": dict(tally.statuses), "wrong": tally.wrong, "lost": lost, "seconds": seconds, "exit_code": code}


def start(args: argparse.Namespace) -> tuple[Process, int]:
    """A server of our own on a free port. Raises RuntimeError if it does not come up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "demo.serve", args.checkpoint, "--port", str(port), "--max-rows", str(args.max_rows),
               "--max-waiting", str(args.max_waiting), "--max-per-user", str(args.clients + 1)]  # fmt: skip
    process = subprocess.Popen(command)
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            time.sleep(0.1)
        if process.poll() is not None:
            break
    process.kill()
    raise RuntimeError(f"the server did not start: {' '.join(command)}")


def main(argv: Sequence[str]) -> int:
    """0 if nothing was lost or crossed; the numbers go to `--output` and, without the curve of memory, to the screen."""
    parser = argparse.ArgumentParser(description="Many clients at once, every answer checked.")
    parser.add_argument("checkpoint", nargs="?", default="checkpoints/orthus-small")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--max-waiting", type=int, default=12, help="small, so that 429 is seen as well")
    parser.add_argument("--num-seeds", type=int, default=2, help="how many times 15 requests the set has")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the time before memory is judged")
    parser.add_argument("--tolerance", type=int, default=2, help="of 255, by which a pixel may differ from the answer alone")
    parser.add_argument("--output", default="runs/load.json")
    args = parser.parse_args(argv)
    process, port = start(args)
    try:
        expected: dict[Request, Reply] = {}
        requests = requests_of(args.num_seeds)
        alone(port, requests[:2], {})  # what the first request pays for
        before = alone(port, requests, expected)
        loaded = under_load(process, port, expected, args)
        after = alone(port, requests, expected)
        rate = (before["answers"] + after["answers"]) / (before["seconds"] + after["seconds"])
        report = {"alone": [before, after], "load": loaded, "times_alone": loaded["answers_per_second"] / rate}
        report |= {"tolerance": args.tolerance, "requests": len(expected), "telling": num_telling(expected, args.tolerance)}
        report["stop"] = stopped_under_load(process, port, expected, args)
    finally:
        process.kill()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(report, indent=1))
    shown = {**report, "load": {name: value for name, value in loaded.items() if name != "memory_mb"}}
    print(json.dumps(shown, indent=1))
    return int(any(report[part][name] for part in ("load", "stop") for name in ("wrong", "lost")))


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
