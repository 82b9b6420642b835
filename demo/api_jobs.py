"""From jobs of the engine, which block, to responses: answers in one piece, and streams of server-sent events."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from demo.api_errors import ClientGone, RequestError, refusal
from orthus.data.schema import Turn
from orthus.serving import Answer, Done, Engine, Job, JobEvent, Options, QueueFull, TooManyRequests

HEARTBEAT = 10.0  # seconds without an event after which a stream sends a comment
ENDINGS = {
    "timeout": (504, "the request took longer than the server allows", "timeout"),
    "shutdown": (503, "the server is stopping; send the request again in a moment", "shutting_down"),
    "cancelled": (503, "the request was cancelled", "cancelled"),
}
Result = TypeVar("Result")


@dataclass
class Jobs:
    """The jobs of one HTTP request; those that are not over are cancelled when it ends, however it ends."""

    engine: Engine
    deadline: float  # of the event loop's clock
    jobs: list[Job] = field(default_factory=list)
    over: set[int] = field(default_factory=set)

    async def submit(self, turns: Sequence[Turn], options: Sequence[Options], user: str, is_closing: Callable[[], bool]) -> None:
        """All of them or none. Raises `RequestError`: 400 for what cannot be answered, 429 and 503 with Retry-After."""
        try:
            await to_thread.run_sync(self._submit, turns, options, user)
        except QueueFull as error:
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            if is_closing():
                raise RequestError(503, ENDINGS["shutdown"][1], code="shutting_down", headers=headers) from None
            if isinstance(error, TooManyRequests):
                message, code = "you have as many requests here as one user may have", "too_many_requests"
            else:
                message, code = "the queue is full", "queue_full"
            message += f"; try again in {headers['Retry-After']} s"
            raise RequestError(429, message, code=code, headers=headers) from None
        except ValueError as error:
            raise refusal(error, "invalid_prompt") from None

    def _submit(self, turns: Sequence[Turn], options: Sequence[Options], user: str) -> None:
        self.jobs += self.engine.submit_all(turns, options, user)

    def close(self) -> None:
        for index, job in enumerate(self.jobs):
            if index not in self.over:
                job.cancel()

    async def events(self, only_last: bool = False) -> AsyncIterator[tuple[int, JobEvent] | None]:
        """`(index of the job, event)` as they come, or `only_last` ones; None after `HEARTBEAT` seconds of silence.

        Raises `RequestError` 504 at the deadline, and what a job raises.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, JobEvent | Exception]] = asyncio.Queue()
        for index, job in enumerate(self.jobs):
            threading.Thread(target=_pump, args=(index, job, only_last, loop, queue), daemon=True).start()
        while len(self.over) < len(self.jobs):
            left = self.deadline - loop.time()
            if left <= 0:
                raise ending("timeout")
            try:
                index, event = await asyncio.wait_for(queue.get(), min(left, HEARTBEAT))
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                self.over.add(index)
                raise event
            if isinstance(event, Done):
                self.over.add(index)
            yield index, event

    async def answers(self) -> list[Answer]:
        """All answers, in order. Raises `RequestError` if one did not come to an end by itself."""
        found: dict[int, Answer] = {}
        async for item in self.events(only_last=True):
            if item and isinstance(item[1], Done):
                found[item[0]] = whole(item[1].answer)
        return [found[index] for index in range(len(self.jobs))]


def _pump(
    index: int,
    job: Job,
    only_last: bool,
    loop: asyncio.AbstractEventLoop,
    queue: "asyncio.Queue[tuple[int, JobEvent | Exception]]",
) -> None:
    try:
        try:
            for event in (Done(job.result()),) if only_last else job.events():
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))
        except Exception as error:
            loop.call_soon_threadsafe(queue.put_nowait, (index, error))
    except RuntimeError:  # the event loop is closed: nobody listens
        job.cancel()


def ending(reason: str) -> RequestError:
    status, message, code = ENDINGS[reason]
    return RequestError(status, message, code=code, headers={"Retry-After": "5"} if status == 503 else None)


def whole(answer: Answer) -> Answer:
    """The answer. Raises `RequestError` for one that was broken off."""
    if answer.finish_reason in ENDINGS:
        raise ending(answer.finish_reason)
    return answer


async def until_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """What `work` returns. Raises `ClientGone` when the client hangs up before."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from an asynchronous iterator of frames; `jobs` end with it."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[str], jobs: Jobs) -> None:
        super().__init__(None, 200, {"X-Accel-Buffering": "no"}, self.media_type)
        del self.headers["content-length"]
        self.frames, self.jobs = frames, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(self._send(send), receive)
        finally:
            self.jobs.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for frame in self.frames:
            await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
