"""Answers as OpenAI's objects, whole and as frames of an event stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from anyio import to_thread

from demo.api_errors import RequestError
from demo.api_jobs import Jobs, whole
from demo.api_pictures import data_uri, png_base64
from orthus.data.schema import Segment
from orthus.serving import Answer, Done, JobEvent, RequestFailed
from orthus.streaming import ImagePreview, TextPiece

DONE = "data: [DONE]\n\n"
Frames = list[dict[str, Any]]


def frame(data: dict[str, Any], event: str | None = None) -> str:
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def picture_part(uri: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri}}


def content_of(segments: Sequence[Segment]) -> str | Frames:
    """A string where there is only text, else a list of parts in reading order."""
    if all(isinstance(segment, str) for segment in segments):
        return "\n".join(map(str, segments))
    return [{"type": "text", "text": part} if isinstance(part, str) else picture_part(data_uri(part)) for part in segments]


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens; each latent of a picture counts as one. The prompt counts once, as OpenAI counts it."""
    prompt, new = max(answer.num_prompt_tokens for answer in answers), sum(answer.num_new_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def image_usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    usage = usage_of(answers)
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "input_tokens_details": {"image_tokens": 0, "text_tokens": usage["prompt_tokens"]},
    }


def completion(model: str, answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    """The object of `/v1/chat/completions`, with `seed`: that of the first choice."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": content_of(answer.segments), "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    return {**_head(model, "chat.completion"), "choices": choices, "usage": usage_of(answers), "seed": seed}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def images(answers: Sequence[Answer], size: str, seed: int) -> dict[str, Any]:
    """The object of `/v1/images/*`, with `seed`: that of the first picture. What the model said first is `revised_prompt`."""
    data = [{"b64_json": png_base64(drawn(answer)), "revised_prompt": said(answer)} for answer in answers]
    head = {"created": int(time.time()), "background": "opaque", "output_format": "png", "size": size}
    return {**head, "data": data, "usage": image_usage_of(answers), "seed": seed}


def drawn(answer: Answer) -> Any:
    """The last picture. Raises `RequestError` 500 where there is none."""
    pictures = [segment for segment in answer.segments if not isinstance(segment, str)]
    if not pictures:
        raise RequestError(500, "the model drew no picture; try another prompt or seed", code="no_picture")
    return pictures[-1]


def said(answer: Answer) -> str | None:
    return "\n".join(segment for segment in answer.segments if isinstance(segment, str)) or None


async def frames_of(jobs: Jobs, make: Callable[[int, JobEvent], list[str]], last: Callable[[], list[str]]) -> AsyncIterator[str]:
    """Frames of all events, then of `last`; what goes wrong is a frame with an error, and the stream ends."""
    try:
        async for item in jobs.events():
            if item is None:
                yield f": place {max(job.place() for job in jobs.jobs)}\n\n"
                continue
            is_text = isinstance(item[1], TextPiece)
            for text in make(*item) if is_text else await to_thread.run_sync(make, *item):  # pictures take a while to encode
                yield text
        for text in last():
            yield text
    except RequestError as error:
        yield frame(error.body(), None)
    except RequestFailed:
        yield frame(RequestError(500, "the engine failed on this request", code="internal_error").body())
    yield DONE


class ChatFrames:
    """Chunks of `/v1/chat/completions`: text in `delta.content`; pictures in `delta.images`, a list of `image_url` parts with
    `index`, `num_drawn` and `is_final`, so that clients which add up `content` are left in peace."""

    def __init__(self, model: str, num_choices: int, has_usage: bool, seed: int) -> None:
        self.head = {**_head(model, "chat.completion.chunk"), "seed": seed}
        self.has_usage = has_usage
        self.started: set[int] = set()
        self.answers: dict[int, Answer] = {}

    def __call__(self, index: int, event: JobEvent) -> list[str]:
        first = [] if index in self.started else [self._chunk(index, {"role": "assistant", "content": ""})]
        self.started.add(index)
        if isinstance(event, TextPiece):
            return [*first, self._chunk(index, {"content": event.text})]
        if isinstance(event, ImagePreview):
            part = picture_part(data_uri(event.picture))
            part |= {"index": event.index, "num_drawn": event.num_drawn, "is_final": event.is_final}
            return [*first, self._chunk(index, {"images": [part]})]
        assert isinstance(event, Done)
        self.answers[index] = whole(event.answer)
        return [*first, self._chunk(index, {}, event.answer.finish_reason)]

    def last(self) -> list[str]:
        return [frame({**self.head, "choices": [], "usage": usage_of(list(self.answers.values()))})] if self.has_usage else []

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return frame({**self.head, "choices": [choice]})


class ImageFrames:
    """Events of `/v1/images/*`: `<kind>.partial_image`, then `<kind>.completed` for each picture."""

    def __init__(self, kind: str, size: str, seed: int) -> None:
        self.kind, self.size, self.seed = kind, size, seed
        self.counts: dict[int, int] = {}

    def __call__(self, index: int, event: JobEvent) -> list[str]:
        if isinstance(event, ImagePreview) and not event.is_final:
            count = self.counts.get(index, 0)
            self.counts[index] = count + 1
            return [self._event("partial_image", png_base64(event.picture), partial_image_index=count)]
        if isinstance(event, Done):
            answer = whole(event.answer)
            details = {"usage": image_usage_of([answer]), "revised_prompt": said(answer)}
            return [self._event("completed", png_base64(drawn(answer)), seed=self.seed + index, **details)]
        return []

    def last(self) -> list[str]:
        return []

    def _event(self, name: str, picture: str, **details: Any) -> str:
        kind = f"{self.kind}.{name}"
        details |= {"created_at": int(time.time()), "size": self.size}
        details |= {"quality": "auto", "background": "opaque", "output_format": "png"}
        return frame({"type": kind, "b64_json": picture, **details}, kind)
