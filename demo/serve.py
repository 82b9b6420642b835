"""The HTTP API alone: `python -m demo.serve checkpoints/orthus-small --port 8000`.

`run` serves any application made by `demo.api.create_api`, with an app mounted on it or not.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h11
import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from demo.api import create_api
from demo.api_errors import RequestError
from demo.api_guard import FOR_ALL, FOR_DATA
from demo.api_settings import Settings
from orthus import OrthusForConditionalGeneration, OrthusProcessor
from orthus.serving import Engine

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
HEADER_SECONDS = 10.0
FLUSH_SECONDS = 60.0  # in which a client must have taken the end of its response
MAX_HEADER_BYTES = 32 * 1024
LAST_CALL = 0.5  # seconds in which requests that are on their way are still read, and refused in words


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit for the headers of a request, which uvicorn does not have, and errors as JSON."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """The clock runs while there is no whole request; single bytes do not set it back."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():  # which lasts until the client has taken everything
            self._timer = self.loop.call_later(FLUSH_SECONDS, self.transport.abort)
        else:
            self._end_with(RequestError(408, "the headers did not arrive in time", code="request_timeout"))

    def send_400_response(self, msg: str) -> None:
        self._end_with(RequestError(400, "this is not an HTTP/1.1 request that the server understands", code="invalid_http"))

    def _end_with(self, error: RequestError) -> None:
        body = json.dumps(error.body()).encode()
        headers = {**FOR_ALL, **FOR_DATA, "Content-Type": "application/json", "Content-Length": str(len(body))}
        headers["Connection"] = "close"
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = h11.Response(status_code=error.status, headers=list(headers.items()))
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: new requests are refused in words, waiting ones end with an error, running ones have `seconds`."""

    def __init__(self, config: uvicorn.Config, engine: Engine, app: FastAPI, seconds: float) -> None:
        super().__init__(config)
        self.engine, self.app, self.seconds = engine, app, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.api.is_closing = True
        closing = asyncio.ensure_future(asyncio.to_thread(self.engine.close, self.seconds))
        await asyncio.sleep(LAST_CALL)
        await super().shutdown(sockets)
        await closing


def run(
    app: FastAPI, engine: Engine, host: str = "127.0.0.1", port: int = 8000, *, seconds: float = 30.0, **options: Any
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish within `seconds`. Prompts and pictures are never logged.

    options: of `uvicorn.Config`.
    """
    defaults: dict[str, Any] = {"log_level": "warning", "ws": "none", "limit_concurrency": 512}
    fixed: dict[str, Any] = {
        "http": PatientProtocol,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # or every client could choose the address that its limit is counted by
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "timeout_graceful_shutdown": int(seconds) + 10,
    }
    config = uvicorn.Config(app, host=host, port=port, **{**defaults, **options}, **fixed)
    Server(config, engine, app, seconds).run()


def load_engine(args: argparse.Namespace) -> Engine:
    """The checkpoint of a command line with the options of `add_engine_options`."""
    dtype = getattr(torch, args.dtype)
    model = OrthusForConditionalGeneration.from_pretrained(args.checkpoint, dtype=dtype).eval().to(args.device)
    processor = OrthusProcessor.from_pretrained(args.checkpoint)
    limits = {"max_rows": args.max_rows, "max_waiting": args.max_waiting, "max_per_user": args.max_per_user}
    return Engine(model, processor, **limits, max_seconds=args.max_seconds)


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ValueError for a token that is too short."""
    return Settings(
        model_name=args.model_name or Path(args.checkpoint).resolve().name,
        token=args.token or os.environ.get("ORTHUS_TOKEN") or None,
        max_n=max(1, min(Settings.max_n, args.max_per_user)),
        max_seconds=args.max_seconds,
        allowed_hosts=LOOPBACK if args.host in LOOPBACK else (),
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """What the app and the API alone have in common."""
    parser.add_argument("checkpoint", help="folder of a saved model and processor")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; then set a token")
    parser.add_argument("--token", default="", help="clients must send it as a bearer token; $ORTHUS_TOKEN keeps it out of `ps`")
    parser.add_argument("--model-name", default="", help="in /v1/models; default: the folder's name")
    parser.add_argument("--max-rows", type=int, default=16, help="requests answered at once")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests in the queue before clients get 429")
    parser.add_argument("--max-per-user", type=int, default=4, help="requests at once from one address")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="for one request, queue included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))


def serve(argv: Sequence[str], description: str, port: int, create: Callable[[Engine, Settings], FastAPI], paths: str) -> None:
    """Load a checkpoint as `argv` says and serve the application that `create` makes; `paths`: what to tell of its addresses."""
    parser = argparse.ArgumentParser(description=description)
    add_engine_options(parser)
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--shutdown-seconds", type=float, default=30.0, help="which running requests have after SIGTERM")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = settings_of(args)
    if args.host not in LOOPBACK and settings.token is None:
        print(f"warning: {args.host} is reachable from elsewhere and there is no token: everybody may use it", file=sys.stderr)
    with load_engine(args) as engine:
        app = create(engine, settings)
        print(f"{settings.model_name}: http://{args.host}:{args.port}{paths}", flush=True)
        run(app, engine, args.host, args.port, seconds=args.shutdown_seconds)


def end_in_order(main: Callable[[Sequence[str]], None]) -> None:
    """Run the command line: 0 after SIGTERM or SIGINT, also before the server has handlers of its own; a line for wrong input."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(0) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def main(argv: Sequence[str]) -> None:
    serve(argv, "An OpenAI-compatible HTTP API for a checkpoint.", 8000, create_api, "/v1")


if __name__ == "__main__":
    end_in_order(main)
