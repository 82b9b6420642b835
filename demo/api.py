"""The HTTP API, in OpenAI's shapes: `create_api(engine, settings)` is a FastAPI application that an app may be mounted on.

POST /v1/chat/completions, /v1/images/generations, /v1/images/edits; GET /v1/models, /health, /metrics.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from demo import api_streams
from demo.api_bodies import check_text, read_form, read_json
from demo.api_errors import RequestError
from demo.api_guard import Guard
from demo.api_jobs import EventStream, Jobs, until_gone
from demo.api_metrics import Metrics
from demo.api_pictures import read_picture
from demo.api_schemas import ChatRequest, EditRequest, JsonDrawRequest, chat_options, image_options, parse, turns_of
from demo.api_settings import Settings
from demo.defaults import picture_size
from orthus.data.schema import Turn
from orthus.serving import Answer, Engine, Options, RequestFailed

DECODERS = 2  # pictures decoded at a time
FILE_FIELDS = ("image", "image[]")


class Api:
    """The routes and what they share."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings, self.processor = engine, settings, engine.processor
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self.is_closing = False  # set by the server when it is told to stop
        self.size = "x".join(map(str, picture_size(self.processor)))
        self._decoders = CapacityLimiter(DECODERS)

    async def chat(self, request: Request) -> Response:
        jobs = self._jobs()
        data = await read_json(request)
        query, turns, options = await self._in_thread(self._read_chat, data)
        has_usage = bool(query.stream_options and query.stream_options.include_usage)
        seed, name = options[0].seed, self.settings.model_name
        if query.stream:
            return await self._stream(request, jobs, turns, options, api_streams.ChatFrames(name, query.n, has_usage, seed))
        answers = await self._answers(request, jobs, turns, options)
        return JSONResponse(await self._in_thread(api_streams.completion, name, answers, seed))

    async def draw(self, request: Request) -> Response:
        jobs = self._jobs()
        query = parse(JsonDrawRequest, await read_json(request), self.settings)
        return await self._picture(request, jobs, "draw", query, [])

    async def edit(self, request: Request) -> Response:
        jobs = self._jobs()
        fields, files = await read_form(request, self.settings, FILE_FIELDS)
        query = parse(EditRequest, fields, self.settings, strict=False)
        if len(files) != 1:
            raise RequestError(400, f"{len(files)} files in the field image; send exactly one", "image")
        picture = await self._in_thread(read_picture, files[0], self.processor.image_processor, self.settings, "image")
        return await self._picture(request, jobs, "edit", query, [picture])

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        if name != self.settings.model_name:
            raise RequestError(404, "this model is not served here", "model", "model_not_found")
        return self._model()

    async def health(self) -> JSONResponse:
        """200 while requests are taken, 503 once the server was told to stop."""
        stats = self.engine.stats()
        state = {"status": "stopping" if self.is_closing else "ok", "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(state, 503 if self.is_closing else 200)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self) -> dict[str, Any]:
        return {"id": self.settings.model_name, "object": "model", "created": self.created, "owned_by": "orthus"}

    def _jobs(self) -> Jobs:
        if self.is_closing:
            headers = {"Retry-After": "5", "Connection": "close"}
            raise RequestError(503, "the server is stopping", code="shutting_down", headers=headers)
        return Jobs(self.engine, asyncio.get_running_loop().time() + self.settings.max_seconds)

    def _read_chat(self, data: dict[str, Any]) -> tuple[ChatRequest, list[Turn], list[Options]]:
        query = parse(ChatRequest, data, self.settings)
        return query, turns_of(query, self.processor, self.settings), chat_options(query, self.processor)

    async def _picture(self, request: Request, jobs: Jobs, task: str, query: Any, pictures: Sequence[Any]) -> Response:
        prompt = check_text(query.prompt, "prompt", self.settings.max_text)
        if not prompt.strip():
            raise RequestError(400, "prompt is empty", "prompt", "empty_message")
        options = image_options(task, query, self.processor)
        turns = [Turn("user", (*pictures, prompt))]
        kind = "image_generation" if task == "draw" else "image_edit"
        if query.stream:
            return await self._stream(request, jobs, turns, options, api_streams.ImageFrames(kind, self.size, options[0].seed))
        answers = await self._answers(request, jobs, turns, options)
        return JSONResponse(await self._in_thread(api_streams.images, answers, self.size, options[0].seed))

    async def _answers(self, request: Request, jobs: Jobs, turns: Sequence[Turn], options: Sequence[Options]) -> list[Answer]:
        try:
            await jobs.submit(turns, options, user_of(request), lambda: self.is_closing)
            return await until_gone(jobs.answers(), request.receive)
        except RequestFailed as error:
            raise RequestError(500, "the engine failed on this request", code="internal_error") from error
        finally:
            jobs.close()

    async def _stream(
        self, request: Request, jobs: Jobs, turns: Sequence[Turn], options: Sequence[Options],
        frames: api_streams.ChatFrames | api_streams.ImageFrames,
    ) -> Response:  # fmt: skip
        try:
            await jobs.submit(turns, options, user_of(request), lambda: self.is_closing)
        except BaseException:
            jobs.close()
            raise
        return EventStream(api_streams.frames_of(jobs, frames, frames.last), jobs)

    async def _in_thread(self, function: Callable[..., Any], *values: Any) -> Any:
        return await to_thread.run_sync(function, *values, limiter=self._decoders)


def user_of(request: Request) -> str:
    """For the limit per user: the address, which a client cannot choose as it can a name."""
    return request.client.host if request.client else "unknown"


def create_api(engine: Engine, settings: Settings = Settings()) -> FastAPI:
    """The application; `app.state.api.is_closing = True` makes it refuse new work."""
    app = FastAPI(title="Orthus", docs_url=None, redoc_url=None, openapi_url=None)
    api = app.state.api = Api(engine, settings)
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/images/generations", api.draw, methods=["POST"], response_model=None)
    app.add_api_route("/v1/images/edits", api.edit, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name}", api.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", api.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", api.show_metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_middleware(Guard, settings=settings, metrics=api.metrics)
    return app


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return RequestError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()
