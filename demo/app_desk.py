"""Between the app's tabs and the engine: who runs what, what of it is known by now, and what stops it."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import gradio as gr
from PIL import Image

from demo.api_bodies import check_text
from demo.api_errors import RequestError
from demo.api_pictures import read_picture
from demo.api_settings import Settings
from demo.app_files import Folder
from orthus.data.schema import Segment, Turn
from orthus.serving import Answer, Done, Engine, Job, Options, QueueFull, RequestFailed, TooManyRequests
from orthus.streaming import ImagePreview, TextPiece

TICK_SECONDS = 0.5  # between two looks at the queue while nothing else happens
NUM_PREVIEWS = 16  # of a picture, at most
Request = tuple[Sequence[Turn], Options]


@dataclass(frozen=True)
class Drawn:
    """A picture as far as it is known."""

    picture: Image.Image
    share: float = 1.0  # of its latents


@dataclass
class Draft:
    """What one request has led to so far: text and pictures in order, and `answer` when it is over."""

    parts: list[str | Drawn] = field(default_factory=list)
    answer: Answer | None = None

    def hear(self, event: TextPiece | ImagePreview | Done, num_latents: int) -> None:
        if isinstance(event, Done):
            self.answer = event.answer
            if event.answer.segments:
                self.parts = [Drawn(part) if isinstance(part, Image.Image) else part for part in event.answer.segments]
        elif isinstance(event, TextPiece):
            if self.parts and isinstance(self.parts[-1], str):
                self.parts[-1] += event.text
            else:
                self.parts.append(event.text)
        else:
            places = [place for place, part in enumerate(self.parts) if isinstance(part, Drawn)]
            drawn = Drawn(event.picture, event.num_drawn / num_latents)
            if event.index < len(places):
                self.parts[places[event.index]] = drawn
            else:
                self.parts.append(drawn)

    @property
    def is_stopped(self) -> bool:
        return self.answer is not None and self.answer.finish_reason == "cancelled"

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is whole of it, for the next turn of a conversation."""
        if self.answer is not None and self.answer.segments:
            return self.answer.segments
        whole = [part.picture if isinstance(part, Drawn) else part.strip() for part in self.parts if _is_whole(part)]
        return tuple(part for part in whole if part != "")

    @property
    def pictures(self) -> list[Image.Image]:
        return [part for part in self.segments if isinstance(part, Image.Image)]


def _is_whole(part: str | Drawn) -> bool:
    return isinstance(part, str) or part.share == 1.0


@dataclass(frozen=True)
class Progress:
    """The drafts of some requests, which of them are new, and a line about the queue."""

    drafts: Sequence[Draft]
    changed: frozenset[int]
    note: str


class Desk:
    """Submits requests of the app's users and reports on them. `user` in the engine is an address, as for the API."""

    def __init__(self, engine: Engine, settings: Settings, folder: Folder) -> None:
        self.engine, self.processor, self.settings, self.folder = engine, engine.processor, settings, folder
        self.num_latents = engine.model.config.num_latents
        self.preview_every = max(1, self.num_latents // NUM_PREVIEWS)
        self._lock = threading.Lock()
        self._running: list[tuple[str, str, threading.Event]] = []  # page, tab, what stops it

    def read(self, path: str) -> Image.Image:
        """The picture in a file that Gradio stored. Raises gr.Error for one that is not accepted."""
        if not self.folder.holds(path):
            raise told("The picture was not uploaded here; upload it.")
        try:
            if Path(path).stat().st_size > self.settings.max_image_bytes:
                raise told(f"The picture is larger than {self.settings.max_image_bytes // 1_000_000} MB; send a smaller one.")
            return read_picture(Path(path).read_bytes(), self.processor.image_processor, self.settings, "picture")
        except OSError as error:
            raise told("The picture is not there any more; send it again.") from error
        except RequestError as error:
            raise told(error.message) from error

    def stop(self, request: gr.Request, tab: str = "") -> None:
        """End what runs in one tab of a page, or in all of them."""
        page = page_of(request)
        with self._lock:
            stops = [stop for other, name, stop in self._running if page and other == page and tab in ("", name)]
        for stop in stops:
            stop.set()

    def stopper(self, tab: str) -> Callable[..., None]:
        """What a stop button does."""

        def stop(request: gr.Request) -> None:
            self.stop(request, tab)

        return stop

    def run(self, request: gr.Request, tab: str, requests: Sequence[Request], *, replaces: bool = True) -> Iterator[Progress]:
        """Drafts as they grow, until all are over; closing the iterator ends the jobs. Raises gr.Error with what to do.

        replaces: whether what still runs in the same tab of the same page ends, as on a page, where there is room for one.
        """
        length = sum(len(part) for turns, _ in requests for turn in turns for part in turn.segments if isinstance(part, str))
        if length > self.settings.max_text:
            raise told(f"The text has {length} characters, at most {self.settings.max_text} are accepted; shorten it.")
        if replaces:
            self.stop(request, tab)
        running = (page_of(request), tab, threading.Event())
        with self._lock:
            self._running.append(running)
        given = [(turns, replace(options, preview_every=self.preview_every)) for turns, options in requests]
        run = _Run(self, address_of(request), given, running[2])
        try:
            yield from run.follow()
        except QueueFull as error:
            raise told(f"{error}. Try again in about {error.retry_after:.0f} s.") from error
        except (ValueError, RequestFailed) as error:
            raise told(str(error)) from error
        finally:
            run.cancel()
            with self._lock:
                self._running.remove(running)


class _Run:
    """Several requests of one user, as many at a time as the engine accepts from one."""

    def __init__(self, desk: Desk, user: str, requests: Sequence[Request], stop: threading.Event) -> None:
        self.desk, self.user, self.stop = desk, user, stop
        self.pending = deque(enumerate(requests))
        self.drafts = [Draft() for _ in requests]
        self.jobs: dict[int, Job] = {}
        self.events: queue.Queue[tuple[int, Any]] = queue.Queue()

    def follow(self) -> Iterator[Progress]:
        self._submit()
        yield Progress(self.drafts, frozenset(range(len(self.drafts))), self._note())
        while self.jobs or self.pending:
            if self.stop.is_set():
                self.cancel()
            changed = frozenset(self._hear(*item) for item in self._arrived())
            self._submit()
            yield Progress(self.drafts, changed, self._note())

    def cancel(self) -> None:
        self.pending.clear()
        for job in list(self.jobs.values()):
            job.cancel()

    def _submit(self) -> None:
        while self.pending:
            index, (turns, options) = self.pending[0]
            try:
                job = self.desk.engine.submit(turns, options, self.user)
            except TooManyRequests:
                if index == 0:
                    raise
                return
            self.pending.popleft()
            self.jobs[index] = job
            threading.Thread(target=self._listen, args=(index, job), daemon=True).start()

    def _listen(self, index: int, job: Job) -> None:
        try:
            for event in job.events():
                self.events.put((index, event))
        except RequestFailed as error:
            self.events.put((index, error))

    def _arrived(self) -> list[tuple[int, Any]]:
        """All events there are; waits for the first one, but no longer than until the queue is to be looked at again."""
        try:
            events = [self.events.get(timeout=TICK_SECONDS)]
        except queue.Empty:
            return []
        while not self.events.empty():
            events.append(self.events.get())
        return events

    def _hear(self, index: int, event: Any) -> int:
        if isinstance(event, RequestFailed):
            raise event
        self.drafts[index].hear(event, self.desk.num_latents)
        if isinstance(event, Done):
            del self.jobs[index]
        return index

    def _note(self) -> str:
        jobs = list(self.jobs.values())
        if not jobs:
            return outcome(self.drafts)
        place = min(job.place() for job in jobs)
        seconds = [known for known in (job.estimate() for job in jobs) if known is not None]
        left = f" · about {max(1, round(max(seconds)))} s" if seconds else ""
        return (f"Number {place} in the queue" if place else "Working") + left


def outcome(drafts: Sequence[Draft]) -> str:
    """A line about requests that are over."""
    answers = [draft.answer for draft in drafts if draft.answer is not None]
    if len(answers) < len(drafts) or any(answer.finish_reason == "cancelled" for answer in answers):
        return "Stopped"
    if reasons := {answer.finish_reason for answer in answers} - {"stop"}:
        words = {"length": "ended at the length limit", "timeout": "ended at the time limit", "shutdown": "the server is closing"}
        return "Done: " + ", ".join(words[reason] for reason in sorted(reasons))
    seconds = max(answer.seconds for answer in answers)
    return f"Done in {seconds:.1f} s"


def page_of(request: gr.Request) -> str:
    """Names one open page, or one client of the Gradio API; empty where a client gave no name."""
    return str(request.session_hash or "")


def address_of(request: gr.Request) -> str:
    """For the limit per user, which a client must not escape with another session."""
    client = getattr(request, "client", None)
    return str(client.host) if client else "unknown"


def seed_of(value: float | None) -> int:
    """Raises gr.Error for a field that was cleared and for what is no whole number from 0 on."""
    if value is None or not 0 <= value < 2**63 or value != int(value):
        raise told("The seed must be a whole number from 0 on; write one, for example 0.")
    return int(value)


def text_of(value: str | None, most: int) -> str:
    """What was written, without space around it. Raises gr.Error for control characters and more than `most` characters."""
    try:
        return check_text(value or "", "the text", most).strip()
    except RequestError as error:
        advice = "; shorten it." if len(value or "") > most else "."
        raise told(f"{error.message[0].upper()}{error.message[1:]}{advice}") from error


def options_of(default: Options, **changes: Any) -> Options:
    """Raises gr.Error for values that are not accepted."""
    try:
        return replace(default, **changes)
    except (ValueError, TypeError) as error:
        raise told(str(error)) from error


def quiet(blocks: gr.Blocks) -> None:
    """Inputs that Gradio refuses are told to the user and not logged: the message would hold what was written."""
    read: Any = blocks.preprocess_data

    async def preprocess_data(*args: Any, **options: Any) -> Any:
        try:
            return await read(*args, **options)
        except gr.Error as error:
            raise told(str(error.message)) from None
        except Exception:
            raise told("An input is empty or not of the kind that belongs there; fill it in again.") from None

    cast(Any, blocks).preprocess_data = preprocess_data


def told(message: str) -> gr.Error:
    """An error for the user, not for the server's log."""
    return gr.Error(message, duration=8, print_exception=False)
