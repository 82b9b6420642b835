"""An engine with the interface of `orthus.serving.Engine` that answers at once, from the request alone."""

import hashlib
import threading
import time
from collections.abc import Sequence

from PIL import Image

from orthus.data.schema import Turn
from orthus.processing import OrthusProcessor, build_processor
from orthus.serving import Answer, Done, Job, Options, QueueFull, RequestFailed, Stats, TooManyRequests
from orthus.streaming import ImagePreview, TextPiece

SIZE, NUM_LATENTS = 8, 4


def small_processor() -> OrthusProcessor:
    return build_processor(["draw a red circle", "what is it"] * 20, 300, SIZE, NUM_LATENTS, "Generate an image.")


def color_of(prompt: str, seed: int) -> tuple[int, int, int]:
    digest = hashlib.sha256(f"{prompt}|{seed}".encode()).digest()
    return digest[0], digest[1], digest[2]


class FakeEngine:
    """Says the last text it was given, backwards, and draws one colour if the text has the word "draw" or must draw.

    The text may hold commands: "slow" waits until it is cancelled or closed, "crash" fails.
    """

    def __init__(self, max_waiting: int = 8, max_per_user: int = 4) -> None:
        self.processor = small_processor()
        self.max_waiting, self.max_per_user = max_waiting, max_per_user
        self.jobs: list[Job] = []
        self.requests: list[tuple[list[Turn], Options, str]] = []
        self.is_closed = threading.Event()

    def submit(self, turns: Sequence[Turn], options: Options = Options(), user: str = "") -> Job:
        arguments = options.arguments(self.processor, turns)
        self._check_room(user, 1)
        job = Job(user, lambda job: 0, lambda job: None)
        self.jobs.append(job)
        self.requests.append((list(turns), options, user))
        work = (job, list(turns), options, arguments["input_ids"].shape[1])
        threading.Thread(target=self._answer, args=work, daemon=True).start()
        return job

    def submit_all(self, turns: Sequence[Turn], options: Sequence[Options], user: str = "") -> list[Job]:
        self._check_room(user, len(options))
        return [self.submit(turns, one, user) for one in options]

    def _check_room(self, user: str, number: int) -> None:
        open_jobs = [job for job in self.jobs if not job.is_over]
        if self.is_closed.is_set() or len(open_jobs) + number > self.max_waiting:
            raise QueueFull("full", 2.5)
        if sum(job.user == user for job in open_jobs) + number > self.max_per_user:
            raise TooManyRequests("yours", 1.5)

    def stats(self) -> Stats:
        return Stats(running=sum(not job.is_over for job in self.jobs), served=sum(job.is_over for job in self.jobs))

    def close(self, seconds: float = 30.0) -> None:
        self.is_closed.set()

    def _answer(self, job: Job, turns: list[Turn], options: Options, num_prompt: int) -> None:
        prompt = " ".join(part for part in turns[-1].segments if isinstance(part, str))
        if "crash" in prompt:
            job.fail(RequestFailed("secret prompt"))
            return
        while "slow" in prompt and not (job.is_cancelled or self.is_closed.is_set()):
            time.sleep(0.005)
        reason = "cancelled" if job.is_cancelled else "shutdown" if self.is_closed.is_set() else "stop"
        segments: list[str | Image.Image] = []
        if options.modality != "image":
            said = prompt[::-1].strip()
            for start in range(0, len(said), 4):
                job.emit(TextPiece(0, said[start : start + 4]))
            segments.append(said)
        if options.modality != "text" and (options.force_image or options.modality == "image" or "draw" in prompt):
            picture = Image.new("RGB", (SIZE, SIZE), color_of(prompt, options.seed))
            every = options.preview_every or NUM_LATENTS
            for count in range(every, NUM_LATENTS, every):
                job.emit(ImagePreview(0, 0, count, False, picture))
            job.emit(ImagePreview(0, 0, NUM_LATENTS, True, picture))
            segments.append(picture)
        job.emit(Done(Answer(tuple(segments), reason, num_prompt, 7, 0.01, 0.0)))
