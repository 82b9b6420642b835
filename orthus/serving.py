"""The serving engine: requests of many users in one decoding loop, which they join and leave as they come and go.

`submit` may be called from any thread; one thread of the engine owns the model. A request has a row of the loop, and up to three
lines of the backbone for its guidance. What a row writes and draws does not depend on its neighbours: each has a generator of its
own, masks and positions of its own, and its draws are those of `generate`.
"""

import logging
import math
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orthus.backbone_rows import lines_may_join
from orthus.continuation import PromptTooLong
from orthus.data.schema import Turn
from orthus.decoding import DecodingLoop
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.serving_queue import FairQueue, MovingMean, Rate
from orthus.serving_requests import Answer, Done, Job, JobEvent, Options, QueueFull, RequestFailed, TooManyRequests
from orthus.serving_tasks import Task

__all__ = ["Answer", "Done", "Engine", "Job", "JobEvent", "Options", "PromptTooLong", "QueueFull", "RequestFailed", "Stats",
           "TooManyRequests"]  # fmt: skip

logger = logging.getLogger(__name__)
RETRY_SECONDS = 5.0  # while nothing has been measured


@dataclass(frozen=True)
class Stats:
    """Counts since the start; `running` and `waiting` are of now, rates of the last minute; a mean is None before the first.

    served: answers given, those that were cut short included, but not to requests that were cancelled, or still waiting when the
        engine was closed.
    """

    running: int = 0
    waiting: int = 0
    served: int = 0
    cancelled: int = 0
    failed: int = 0
    latents_per_second: float = 0.0
    tokens_per_second: float = 0.0
    seconds_per_request: float | None = None


class Engine:
    """Answers requests with one model, which must not change meanwhile. Thread-safe; a context manager.

    Where the backbone's layers forget columns (sliding windows, recurrent layers) or its positions depend on the longest row,
    requests cannot share a cache: they are answered one at a time, and a warning says so. On CUDA no graphs are captured, because
    the number of rows changes all the time.

    Args:
        max_rows: requests that are answered at the same time.
        max_waiting: requests that wait beside them.
        max_per_user: requests of one user, waiting and running; `user=""` is nobody in particular and has no limit.
        max_seconds: for which a request may run; then it ends with what there is ("timeout").
        max_diffusion_steps: that a request may ask for, as all rows wait for the slowest; a checkpoint's own may be more.
    """

    def __init__(
        self,
        model: OrthusForConditionalGeneration,
        processor: OrthusProcessor,
        *,
        max_rows: int = 16,
        max_waiting: int = 64,
        max_per_user: int = 4,
        max_seconds: float = 600.0,
        max_diffusion_steps: int = 100,
    ) -> None:
        for name, value, least in (("max_rows", max_rows, 1), ("max_waiting", max_waiting, 0), ("max_per_user", max_per_user, 1),
                                   ("max_diffusion_steps", max_diffusion_steps, 1)):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value} is below {least}")
        if max_seconds <= 0:
            raise ValueError(f"max_seconds={max_seconds} must be positive")
        if max_rows > 1 and not lines_may_join(model.config.text_config):
            warnings.warn("requests cannot share this backbone's cache; they are answered one at a time", stacklevel=2)
            max_rows = 1
        self.model, self.processor = model, processor
        self.max_rows, self.max_waiting, self.max_per_user, self.max_seconds = max_rows, max_waiting, max_per_user, max_seconds
        self.max_diffusion_steps = max_diffusion_steps
        self._changed = threading.Condition()  # guards all that follows
        self._rendering = threading.Lock()  # of prompts; tokenizers are not made for several threads
        self._waiting: FairQueue[Task] = FairQueue()
        self._running: list[Task] = []
        self._close_at: float | None = None
        self._counts = {"served": 0, "cancelled": 0, "failed": 0}
        self._latents, self._tokens = Rate(), Rate()
        self._request_seconds, self._position_seconds, self._positions = MovingMean(), MovingMean(), MovingMean()
        self._loop = self._new_loop()
        self._thread = threading.Thread(target=self._work, name="orthus-engine", daemon=True)
        self._thread.start()

    def submit(self, turns: Sequence[Turn], options: Options = Options(), user: str = "") -> Job:
        """Put a request into the queue.

        Raises:
            ValueError: turns or options that cannot be answered (a guidance without its picture, ...); PromptTooLong.
            QueueFull: too many are waiting, or the engine is closed; TooManyRequests: too many of this user.
        """
        return self.submit_all(turns, [options], user)[0]

    def submit_all(self, turns: Sequence[Turn], options: Sequence[Options], user: str = "") -> list[Job]:
        """Several answers to the same turns, a request each: all of them or none. Raises as `submit`, and ValueError for more
        than there is ever room for."""
        most = min(self.max_rows + self.max_waiting, self.max_per_user if user else math.inf)
        if len(options) > most:
            raise ValueError(f"{len(options)} answers at once; at most {most} are possible here")
        for one in options:
            if one.num_diffusion_steps is not None and one.num_diffusion_steps > self.max_diffusion_steps:
                allowed = f"at most {self.max_diffusion_steps} are allowed here"
                raise ValueError(f"num_diffusion_steps={one.num_diffusion_steps}; {allowed}")
        with self._changed:
            self._check_room(user, len(options))
        with self._rendering:
            tasks = [Task(self.model, self.processor, turns, one, self._new_job(user)) for one in options]
        with self._changed:
            self._check_room(user, len(options))
            for task in tasks:
                self._waiting.put(user, task)
            self._changed.notify_all()
        return [task.job for task in tasks]

    def stats(self) -> Stats:
        with self._changed:
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                latents_per_second=self._latents.per_second(),
                tokens_per_second=self._tokens.per_second(),
                seconds_per_request=self._request_seconds.value,
                **self._counts,
            )

    def close(self, seconds: float = 30.0) -> None:
        """Take no more requests. Running ones may finish within `seconds`; they and those that wait then end with "shutdown"."""
        waiting = []
        with self._changed:
            close_at = time.monotonic() + seconds
            self._close_at = close_at if self._close_at is None else min(self._close_at, close_at)
            while (task := self._waiting.take()) is not None:
                waiting.append(task)
            self._changed.notify_all()
        for task in waiting:
            task.job.emit(Done(task.answer("shutdown")))
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()

    # What callers and jobs ask

    def _new_job(self, user: str) -> Job:
        return Job(user, self._place, self._estimate, self._cancel)

    def _check_room(self, user: str, number: int) -> None:
        if self._close_at is not None:
            raise QueueFull("the engine is closed", RETRY_SECONDS)
        own = [*(task for task in self._running if task.job.user == user), *self._waiting.items(user)]
        if user and len(own) + number > self.max_per_user:
            leaving = sorted(RETRY_SECONDS if left is None else left for left in (self._estimate(task.job) for task in own))
            message = f"{len(own)} requests of this user are waiting or running already"
            raise TooManyRequests(message, max(1.0, leaving[len(own) + number - self.max_per_user - 1]))
        if len(self._waiting) + len(self._running) + number > self.max_rows + self.max_waiting:
            counts = f"{len(self._running)} requests are running and {len(self._waiting)} waiting"
            raise QueueFull(f"the queue is full: {counts}", self._seconds_to_room())

    def _seconds_to_room(self) -> float:
        """About how long until a running request leaves."""
        known = self._request_seconds.value
        return RETRY_SECONDS if known is None else max(1.0, known / max(len(self._running), 1))

    def _place(self, job: Job) -> int:
        with self._changed:
            return self._waiting.place(lambda task: task.job is job)

    def _estimate(self, job: Job) -> float | None:
        """Positions that are still needed, by what requests needed lately, times seconds per position."""
        with self._changed:
            if job.is_over:
                return 0.0
            pace, needed = self._position_seconds.value, self._positions.value
            if pace is None or needed is None:
                return None
            before = max(self._waiting.place(lambda task: task.job is job) - (self.max_rows - len(self._running)), 0)
            done = next((task.num_positions for task in self._running if task.job is job), 0)
            return pace * (max(needed - done, 1.0) + needed * before / self.max_rows)

    def _cancel(self, job: Job) -> None:
        with self._changed:
            task = self._waiting.remove(lambda task: task.job is job)
            if task is not None:
                self._counts["cancelled"] += 1
        if task is not None:
            job.emit(Done(task.answer("cancelled")))

    # The thread of the engine

    def _new_loop(self) -> DecodingLoop:
        acceleration = "packed" if self.model.device.type == "cpu" else "none"
        return DecodingLoop(self.model, acceleration, self.model.device, is_shared=True)

    @torch.no_grad()
    def _work(self) -> None:
        with self._loop.ready():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # whose fault it is cannot be told any more, so all fail
                    self._loop = self._new_loop()
                    for task in list(self._running):
                        self._fail(task, error)

    def _turn(self) -> None:
        """Let rows join and leave, then one position of all of them."""
        while (task := self._next()) is not None:
            try:
                self._loop.join(self._loop.read(task.begin()))
            except Exception as error:
                self._fail(task, error)
        self._let_go()
        if self._running:
            self._advance()

    def _wait(self) -> bool:
        """Until there is something to do; False when there will never be."""
        with self._changed:
            while not self._running and not len(self._waiting):
                if self._close_at is not None:
                    return False
                self._changed.wait()
            return True

    def _next(self) -> Task | None:
        """The next request, if there is a row for it; it counts as running."""
        with self._changed:
            task = self._waiting.take() if len(self._running) < self.max_rows else None
            if task is not None:
                self._running.append(task)
            return task

    def _let_go(self) -> None:
        """Take out the requests that nobody wants any more, whose time is up, or whose listener failed."""
        now, leaving = time.monotonic(), list[tuple[Task, str | None]]()
        is_closed = self._close_at is not None and now >= self._close_at
        for task in self._running:
            is_late = task.seconds > self.max_seconds
            reason = "cancelled" if task.job.is_cancelled else "shutdown" if is_closed else "timeout" if is_late else None
            if reason is not None or task.listener.error is not None:
                leaving.append((task, reason))
        if leaving:
            self._loop.leave([task.continuation for task, _ in leaving if task.continuation is not None])
            for task, reason in leaving:
                self._finish(task, reason)

    def _advance(self) -> None:
        started = time.perf_counter()
        done = self._loop.advance()
        with self._changed:
            self._position_seconds.add(time.perf_counter() - started)
            drawn = sum(len(task.continuation.drawn) for task in self._running if task.continuation is not None)
            self._latents.add(drawn)
            self._tokens.add(len(self._running) - drawn)
        for task in [task for task in self._running if task.continuation in done]:
            self._finish(task, None)

    def _finish(self, task: Task, reason: str | None) -> None:
        """Give the answer; `reason` None: the row came to its own end."""
        try:
            if task.listener.error is not None:
                raise task.listener.error
            answer = task.answer(reason)
        except Exception as error:
            self._fail(task, error)
            return
        with self._changed:
            self._running.remove(task)
            self._counts["cancelled" if reason == "cancelled" else "served"] += 1
            if reason is None:
                self._request_seconds.add(answer.seconds)
                self._positions.add(task.num_positions)
        task.job.emit(Done(answer))

    def _fail(self, task: Task, error: Exception) -> None:
        logger.error("request %s failed", task.job.id, exc_info=error)
        with self._changed:
            self._running.remove(task)
            self._counts["failed"] += 1
        task.job.fail(error.with_traceback(None))  # whose frames hold the tensors of all rows
