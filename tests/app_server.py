"""The app on a port of its own, for tests that talk to it as a browser or a client does."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from demo.api_settings import Settings
from demo.app import create_app
from demo.serve import LOOPBACK
from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.serving import Engine

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "orthus-small"
PICTURE = ROOT / "demo" / "example.png"


@dataclass(frozen=True)
class Server:
    url: str
    folder: Path
    engine: Engine
    app: FastAPI


@contextlib.contextmanager
def served(folder: Path, token: str | None = None, **limits: Any) -> Iterator[Server]:
    """The shipped checkpoint behind the app, files under `folder`."""
    model = OrthusForConditionalGeneration.from_pretrained(str(CHECKPOINT)).eval()
    with Engine(model, OrthusProcessor.from_pretrained(CHECKPOINT)) as engine:
        app = create_app(engine, Settings("orthus-small", token=token, allowed_hosts=LOOPBACK, **limits), folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        try:
            yield Server(f"http://127.0.0.1:{port}/", folder, engine, app)
        finally:
            app.state.api.is_closing = True
            server.should_exit = True
            thread.join(20)
