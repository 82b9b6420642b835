"""A request on its way through the decoding loop: from turns and options to a continuation, and from its row to the answer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from orthus.backbone_rows import Prompt
from orthus.continuation import Continuation, Drawing, Limits, RandomChoice, Row, Writing
from orthus.data.schema import Turn
from orthus.generation import guidance_stream, limits_for, output_of, warpers
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.serving_requests import MAX_PREVIEWS, Answer, Job, Options
from orthus.streaming import SegmentStreamer


class Task:
    """One request: its prompts and limits, and once it runs its continuation. Raises ValueError for what cannot be answered."""

    def __init__(
        self,
        model: OrthusForConditionalGeneration,
        processor: OrthusProcessor,
        turns: Sequence[Turn],
        options: Options,
        job: Job,
    ) -> None:
        self.model, self.processor, self.options, self.job = model, processor, options, job
        self._limits([rendered(processor, turns)])  # raises for a long prompt before the work on its pictures
        self.arguments = options.arguments(processor, turns)
        self.streams = streams_of(model, self.arguments)
        self.limits = self._limits(self.streams)
        model.diffusion_head.sampler_steps(options.sampling)  # raises for a sampler that this head cannot have
        least = -(-model.config.num_latents // MAX_PREVIEWS)
        if 0 < options.preview_every < least:
            raise ValueError(
                f"preview_every={options.preview_every} makes too many previews; use at least {least}, or 0 for none"
            )
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.continuation: Continuation | None = None
        self.listener = Listener(SegmentStreamer(model, processor, job.emit, options.preview_every))

    def _limits(self, streams: list[Prompt]) -> Limits:
        one = self.options
        return limits_for(self.model, one.modality, one.max_new_tokens, one.max_images, one.force_image, streams)

    @property
    def seconds(self) -> float:
        """Since it began to run."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def num_positions(self) -> int:
        return 0 if self.continuation is None else self.continuation.num_positions

    def begin(self) -> Continuation:
        """What joins the loop. Pictures of the prompt are encoded here."""
        self.started = time.monotonic()
        options, device = self.options, self.model.device
        pictures = [self.arguments.pop(name, None) for name in ("pixel_values", "image_latents")]
        latents = self.model._resolve_latents(*(None if given is None else given.to(device) for given in pictures))
        with_pictures = 2 if options.image_guidance is not None else 1  # the prompt itself and the stream that keeps its pictures
        streams = [replace(s, image_latents=latents) if i < with_pictures else s for i, s in enumerate(self.streams)]
        generator = self.arguments["generator"]
        drawing = Drawing(options.guidance, options.image_guidance, options.sampling, None, generator)
        processors = LogitsProcessorList(warpers(options.do_sample, options.temperature, 0, options.top_p, 0.0))
        choice = RandomChoice(generator) if options.do_sample else None
        writing = Writing(processors, StoppingCriteriaList(), choice, options.text_guidance, self.listener)
        self.continuation = Continuation(self.model.config, streams, self.limits, drawing, writing)
        return self.continuation

    def answer(self, reason: str | None) -> Answer:
        """What there is by now; `reason` None: the row came to its own end."""
        prompt_length = self.arguments["input_ids"].shape[1]
        if self.continuation is None or self.started is None:
            return Answer((), reason or "stop", prompt_length, 0, 0.0, time.monotonic() - self.submitted)
        row = self.continuation.rows[0]
        config = self.model.config
        ends_itself = self.limits.modality == "image" or row.tokens[-1:] and row.tokens[-1] in config.end_token_ids
        output = output_of(self.model, [whole_part(row, config)], decode=False)
        pictures = self.listener.streamer.pictures
        output.pixel_values = [torch.stack(pictures[0])] if pictures and pictures[0] else None
        segments = self.processor.decode_segments(output)[0]
        waited = self.started - self.submitted
        reason = reason or ("stop" if ends_itself else "length")
        return Answer(tuple(segments), reason, prompt_length, len(row.tokens), self.seconds, waited)


class Listener:
    """Passes on to a streamer what a continuation tells; an error there is kept, as it concerns this request alone."""

    def __init__(self, streamer: SegmentStreamer) -> None:
        self.streamer = streamer
        self.error: Exception | None = None

    def put(self, value: Tensor) -> None:
        self._tell(self.streamer.put, value)

    def put_latents(self, rows: list[int], latents: Tensor) -> None:
        self._tell(self.streamer.put_latents, rows, latents)

    def end(self) -> None:
        self._tell(self.streamer.end)

    def _tell(self, method: Callable[..., None], *told: Any) -> None:
        if self.error is None:
            try:
                method(*told)
            except Exception as error:
                self.error = error


def rendered(processor: OrthusProcessor, turns: Sequence[Turn]) -> Prompt:
    """The ids of a prompt alone, none of its pictures looked at."""
    ids = torch.tensor([processor.render(turns, add_generation_prompt=True).input_ids])
    return Prompt(ids, torch.ones_like(ids), None)


def streams_of(model: OrthusForConditionalGeneration, arguments: dict[str, Any]) -> list[Prompt]:
    """The prompts of one request, without latents: in full, [pictures only,] [unconditional]."""
    ids, mask = (arguments[name].to(model.device) for name in ("input_ids", "attention_mask"))
    prompt = Prompt(ids, mask, None)
    streams = [prompt]
    for name, prefix in (("image_guidance", "image_negative"), ("guidance", "negative")):
        if f"{prefix}_input_ids" in arguments:
            streams.append(guidance_stream(name, arguments[f"{prefix}_input_ids"], None, prompt, 1, None))
    return streams


def whole_part(row: Row, config: Any) -> Row:
    """A row without the picture that it has only begun."""
    if not row.images or len(row.images[-1]) == config.num_latents:
        return row
    begin = len(row.tokens) - 1 - row.tokens[::-1].index(config.boi_token_id)
    return Row(row.mode, row.tokens[:begin], row.images[:-1])
