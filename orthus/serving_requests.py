"""What callers of the serving engine pass and get: options of a request, its answer, the job that stands for it."""

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from orthus.data.schema import Turn
from orthus.generation import MIN_TEMPERATURE, MODALITIES
from orthus.processing import OrthusProcessor
from orthus.sampling import Sampling
from orthus.streaming import ImagePreview, TextPiece

MAX_PREVIEWS = 32  # of unfinished pictures: per picture, and kept by a job for those who listen late


class QueueFull(Exception):
    """No room for another request now; one is likely in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyRequests(QueueFull):
    """This user has as many requests waiting or running as one user may have."""


class RequestFailed(RuntimeError):
    """The engine could not answer a request; the cause is chained."""


@dataclass(frozen=True)
class Options:
    """How one request is answered; names and meanings are those of `generate`. Raises ValueError.

    Args:
        negative_prompt: what guidance pushes away from; None for the processor's prompt: `interleaved_prompt` where several
            pictures may come between text, else `unconditional_prompt`.
        seed: of all draws of the request.
        preview_every: a preview after so many latents of a picture; 0 for whole pictures only.
    """

    modality: str = "interleaved"
    guidance: float = 1.0
    text_guidance: float = 1.0
    image_guidance: float | None = None
    negative_prompt: str | None = None
    max_images: int | None = None
    force_image: bool = False
    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    num_diffusion_steps: int | None = None
    solver: str | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    preview_every: int = 0

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality={self.modality!r} is not one of {', '.join(MODALITIES)}")
        for name in ("guidance", "text_guidance", "image_guidance"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name}={value} is outside 0..100; 1 is no guidance")
        for name, least in (("max_images", 0), ("max_new_tokens", 1), ("preview_every", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if not MIN_TEMPERATURE <= self.temperature <= 100:
            allowed = f"{MIN_TEMPERATURE:g}..100; use do_sample=False for the likeliest words"
            raise ValueError(f"temperature={self.temperature} is outside {allowed}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be a whole number from 0 to 2**63 - 1")
        if self.negative_prompt is not None and not self.negative_prompt.strip():
            raise ValueError("negative_prompt is empty; use None for the processor's unconditional prompt")
        _ = self.sampling  # raises for what a sampler cannot be

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.solver, self.num_diffusion_steps, guidance_interval=self.guidance_interval)

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1.0 or self.text_guidance != 1.0 or self.image_guidance is not None

    def arguments(self, processor: OrthusProcessor, turns: Sequence[Turn]) -> dict[str, Any]:
        """The arguments of `generate` for this request. Raises ValueError for turns that are no prompt."""
        if self.image_guidance is not None and not any(isinstance(part, Image.Image) for turn in turns for part in turn.segments):
            raise ValueError("image_guidance is for prompts with pictures, and this one has no picture; leave it out or add one")
        arguments: dict[str, Any] = {**processor(turns=list(turns)), "generator": [torch.Generator().manual_seed(self.seed)]}
        names = ("modality", "guidance", "text_guidance", "image_guidance", "max_images", "force_image", "max_new_tokens",
                 "do_sample", "temperature", "top_p", "num_diffusion_steps", "solver", "guidance_interval")  # fmt: skip
        arguments |= {name: getattr(self, name) for name in names}
        if self.is_guided:
            several = self.modality == "interleaved" and self.max_images != 1
            prompt = processor.interleaved_prompt if several else processor.unconditional_prompt
            negative = processor.unconditional(list(turns), prompt=self.negative_prompt or prompt)
            arguments["negative_input_ids"] = negative["input_ids"]
        if self.image_guidance is not None:
            pictures = processor.unconditional(list(turns), keep_images=True)
            arguments["image_negative_input_ids"] = pictures["input_ids"]
        return arguments


@dataclass(frozen=True)
class Answer:
    """What a request led to; `finish_reason`: "stop", "length", "cancelled", "shutdown" or "timeout"."""

    segments: tuple[str | Image.Image, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_new_tokens: int
    seconds: float
    seconds_waited: float


@dataclass(frozen=True)
class Done:
    """The last event of a job."""

    answer: Answer


JobEvent = TextPiece | ImagePreview | Done


class Job:
    """One request in the engine. Its methods may be called from any thread."""

    def __init__(
        self,
        user: str,
        place: Callable[["Job"], int],
        estimate: Callable[["Job"], float | None],
        on_cancel: Callable[["Job"], None] = lambda job: None,
    ) -> None:
        self.id, self.user = uuid.uuid4().hex, user
        self._place, self._estimate, self._on_cancel = place, estimate, on_cancel
        self._changed = threading.Condition()
        self._events: list[JobEvent | None] = []
        self._previews: deque[int] = deque()  # places of those of unfinished pictures
        self._error: BaseException | None = None
        self._is_over = False
        self.is_cancelled = False

    def place(self) -> int:
        """0: running or done, n: n-th in the queue."""
        return self._place(self)

    def estimate(self) -> float | None:
        """Seconds until it is done, None while nothing is known."""
        return self._estimate(self)

    def events(self) -> Iterator[JobEvent]:
        """Everything from the beginning, waiting for what is to come; `Done` is last. Of previews of unfinished pictures only
        the newest are kept for those who fall behind. Raises RequestFailed."""
        given = 0
        while True:
            with self._changed:
                while len(self._events) == given and not self._is_over:
                    self._changed.wait()
                new, is_over = self._events[given:], self._is_over
            given += len(new)
            yield from (event for event in new if event is not None)
            if is_over:
                self._check()
                return

    def result(self, timeout: float | None = None) -> Answer:
        """The answer. Raises RequestFailed, or TimeoutError when there is none after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over, timeout):
                raise TimeoutError(f"job {self.id} is not done after {timeout} s; wait longer or cancel it")
        self._check()
        last = self._events[-1]
        assert isinstance(last, Done)
        return last.answer

    def cancel(self) -> None:
        """End it at its next position, with what there is by then; at once if it is waiting. Nothing happens if it is over."""
        self.is_cancelled = True
        self._on_cancel(self)

    @property
    def is_over(self) -> bool:
        return self._is_over

    def emit(self, event: JobEvent) -> None:
        """For the engine: tell those who listen."""
        with self._changed:
            assert not self._is_over
            self._events.append(event)
            if isinstance(event, ImagePreview) and not event.is_final:
                self._previews.append(len(self._events) - 1)
                if len(self._previews) > MAX_PREVIEWS:
                    self._events[self._previews.popleft()] = None
            self._is_over = isinstance(event, Done)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """For the engine: there will be no answer."""
        with self._changed:
            self._error, self._is_over = error, True
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise RequestFailed(f"job {self.id} failed: {self._error}") from self._error
