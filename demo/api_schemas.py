"""Fields of requests, and how they become turns and options. Unknown fields are refused by name; null means not given."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from demo.api_bodies import check_text
from demo.api_errors import RequestError, refusal
from demo.api_pictures import picture_from_uri
from demo.api_settings import Settings
from demo.defaults import MAX_ANSWER_TOKENS, default_options, picture_size
from orthus.data.schema import Segment, Turn
from orthus.generation import MIN_TEMPERATURE
from orthus.processing import OrthusProcessor
from orthus.serving import Options

MAX_SEED = 2**63 - 1
OWN_FIELDS = ("guidance", "text_guidance", "image_guidance", "negative_prompt", "max_images", "force_image",
              "num_diffusion_steps", "solver", "guidance_interval", "modality")  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Controls(Strict):
    """What all requests share: OpenAI's `model`, `n`, `seed`, `user`, `stream`, and the fields of `orthus.serving.Options`."""

    model: str | None = None
    n: int = Field(default=1, ge=1)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED - 1000)  # answer k of n has seed + k
    user: str | None = Field(default=None, max_length=256)  # taken and not used: who asks is judged by the address
    stream: bool = False
    guidance: float | None = Field(default=None, ge=0, le=100)
    text_guidance: float | None = Field(default=None, ge=0, le=100)
    image_guidance: float | None = Field(default=None, ge=0, le=100)
    negative_prompt: str | None = None
    num_diffusion_steps: int | None = Field(default=None, ge=1)
    solver: str | None = Field(default=None, max_length=32)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # without effect: every picture has the model's size


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(Strict):
    role: Literal["user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = Field(min_length=1, max_length=64)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # without effect


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Controls):
    """`POST /v1/chat/completions`.

    Temperature 0 (all below `MIN_TEMPERATURE`) or none at all is the likeliest word.
    Not OpenAI's: `modality`, `guidance`, `text_guidance`, `image_guidance`,
    `guidance_interval`, `negative_prompt`, `max_images`, `force_image`, `num_diffusion_steps`, `solver`, and `preview_every`, a
    preview in the stream after so many latents of a picture.
    """

    messages: list[Message] = Field(min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=100_000)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: float = Field(default=0.0, ge=0, le=0)
    frequency_penalty: float = Field(default=0.0, ge=0, le=0)
    logprobs: Literal[False] = False
    modality: Literal["text", "image", "interleaved"] | None = None
    max_images: int | None = Field(default=None, ge=0, le=64)
    force_image: bool | None = None
    guidance_interval: list[float] | None = Field(default=None, min_length=2, max_length=2)
    preview_every: int = Field(default=0, ge=0, le=100_000)


class DrawRequest(Controls):
    """`POST /v1/images/generations`. Not OpenAI's: `seed`, `negative_prompt`, guidance, `num_diffusion_steps`, `solver`, and
    `modality`: "interleaved" lets the model say first what it will draw, "image" draws at once."""

    prompt: str = Field(min_length=1)
    size: str | None = Field(default=None, max_length=32)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    partial_images: int = Field(default=0, ge=0, le=3)
    modality: Literal["image", "interleaved"] | None = None


class JsonDrawRequest(DrawRequest):
    guidance_interval: list[float] | None = Field(default=None, min_length=2, max_length=2)


class EditRequest(DrawRequest):
    """`POST /v1/images/edits`: the fields of drawing beside the file `image`; a mask is refused as an unknown field."""


Schema = TypeVar("Schema", bound=Controls)


def parse(schema: type[Schema], data: Mapping[str, Any], settings: Settings, strict: bool = True) -> Schema:
    """Raises `RequestError` that names the first wrong field; 404 for another model than the one that is served."""
    given = {name: value for name, value in data.items() if value is not None}
    if given.get("stop") not in (None, [], ""):
        raise RequestError(400, "stop is not supported; leave it out, the model ends its turns by itself", "stop", "unsupported")
    given.pop("stop", None)
    if isinstance(given.get("messages"), list):
        given["messages"] = [_without_nulls(message) for message in given["messages"]]
    try:
        request = schema.model_validate(given, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise _field_error(first, schema) from None
    if request.model is not None and request.model != settings.model_name:
        message = f"this model is not served here; use {settings.model_name!r}"
        raise RequestError(404, message, "model", "model_not_found")
    if request.n > settings.max_n:
        raise RequestError(400, f"n is {request.n}; at most {settings.max_n} answers per request", "n", "out_of_range")
    steps, most = request.num_diffusion_steps, settings.max_diffusion_steps
    if steps is not None and steps > most:
        message = f"num_diffusion_steps is more than {most}, the most that is accepted here"
        raise RequestError(400, message, "num_diffusion_steps", "out_of_range")
    if request.negative_prompt is not None:
        check_text(request.negative_prompt, "negative_prompt", settings.max_text)
    return request


def _without_nulls(message: Any) -> Any:
    """Clients send what they received, where unused fields are null."""
    return {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else message


def _field_error(first: Any, schema: type[BaseModel]) -> RequestError:
    places = [str(place)[:64] for place in first["loc"] if not str(place).startswith(("list[", "function-", "tagged-"))]
    name = ".".join(place if place.isprintable() else "?" for place in places)
    reason = first["msg"]
    if first["type"] == "extra_forbidden":
        reason = "this field is not supported here"
    elif places[-1:] == ["role"]:
        reason += " (put the text of a system message into the first user message)"
    return RequestError(400, f"{name}: {reason}"[:400], name or None, first["type"])


def turns_of(request: ChatRequest, processor: OrthusProcessor, settings: Settings) -> list[Turn]:
    """Messages -> turns with decoded pictures. Raises `RequestError`."""
    messages = request.messages
    if len(messages) > settings.max_messages:
        raise RequestError(400, f"{len(messages)} messages; at most {settings.max_messages} are accepted", "messages")
    if messages[-1].role != "user":
        raise RequestError(400, "the last message must be the user's", "messages")
    num_pictures = sum(part.type == "image_url" for message in messages for part in message.content)
    if num_pictures > settings.max_pictures:
        raise RequestError(400, f"{num_pictures} pictures; at most {settings.max_pictures} are accepted", "messages")
    room = settings.max_text
    turns = []
    for place, message in enumerate(messages):
        segments: list[Segment] = []
        for index, part in enumerate(message.content):
            param = f"messages.{place}.content.{index}"
            if isinstance(part, TextPart):
                segments.append(check_text(part.text, param, room))
                room -= len(part.text)
            else:
                image_processor = processor.image_processor
                segments.append(picture_from_uri(part.image_url.url, image_processor, settings, param))
        if not any(not isinstance(segment, str) or segment.strip() for segment in segments):
            raise RequestError(400, f"messages.{place} is empty", f"messages.{place}.content", "empty_message")
        turns.append(Turn(message.role, tuple(segments)))
    return turns


def chat_options(request: ChatRequest, processor: OrthusProcessor) -> list[Options]:
    """One for each of the `n` answers. Raises `RequestError` for options that do not go together."""
    changes: dict[str, Any] = {"preview_every": request.preview_every}
    if request.modality == "text":
        changes |= {"guidance": 1.0, "max_new_tokens": MAX_ANSWER_TOKENS, "max_images": None, "force_image": False}
    temperature = request.temperature
    if temperature is None and request.top_p not in (None, 1.0):
        temperature = 1.0
    if temperature is not None and temperature >= MIN_TEMPERATURE:
        changes |= {"do_sample": True, "temperature": temperature, "top_p": request.top_p or 1.0}
    limit = request.max_completion_tokens or request.max_tokens
    if limit is not None:
        changes["max_new_tokens"] = limit
    return _options("chat", request, processor, changes)


def image_options(task: str, request: DrawRequest, processor: OrthusProcessor) -> list[Options]:
    """As `chat_options`, for `task` "draw" or "edit"."""
    check_size(request.size, processor)
    preview_every = -(-processor.num_image_tokens // (request.partial_images + 1)) if request.partial_images else 0
    changes: dict[str, Any] = {"preview_every": preview_every}
    if request.modality == "image":
        changes |= {"force_image": False, "text_guidance": 1.0}
    return _options(task, request, processor, changes)


def _options(task: str, request: Controls, processor: OrthusProcessor, changes: dict[str, Any]) -> list[Options]:
    for name in OWN_FIELDS:
        value = getattr(request, name, None)
        if value is not None:
            changes[name] = tuple(value) if isinstance(value, list) else value
    seed = secrets.randbelow(1 << 31) if request.seed is None else request.seed
    try:
        return [replace(default_options(task, processor), **changes, seed=seed + index) for index in range(request.n)]
    except (ValueError, TypeError) as error:
        raise refusal(error, "invalid_options") from None


def check_size(size: str | None, processor: OrthusProcessor) -> None:
    width, height = picture_size(processor)
    if size not in (None, "auto", f"{width}x{height}"):
        raise RequestError(400, f"the model draws {width}x{height} pixels; leave size out", "size", "invalid_size")
