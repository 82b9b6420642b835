"""What an evaluation harness asks -> turns and options of `generate`, and answers in the form that it grades.

The forms are those of lmms-eval 0.7, whose model class is in `orthus.lmms_eval`; nothing of it is imported here.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from orthus.data.schema import Turn
from orthus.data.world.language import final_answer
from orthus.generation import DEFAULT_TEXT_TOKENS, MODALITIES
from orthus.prompts import chat_turns

if TYPE_CHECKING:
    from orthus.modeling import OrthusForConditionalGeneration
    from orthus.processing import OrthusProcessor

logger = logging.getLogger(__name__)

ALIASES = {"max_gen_toks": "max_new_tokens", "stop_sequences": "until"}
MAX_PICTURES = {"text": 0, "image": 1, "interleaved": 4}
DRAWING = ("output_dir", "guidance", "text_guidance", "image_guidance", "num_diffusion_steps", "max_images", "force_image")


def manifests() -> Any:
    """The entry point of the group `lmms_eval.models`: which class is `--model orthus`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="orthus", chat_class_path="orthus.lmms_eval.OrthusChat")


@dataclass(frozen=True)
class Decoding:
    """How the text of an answer is decoded and where it ends: what a task's `generation_kwargs` mean."""

    max_new_tokens: int = DEFAULT_TEXT_TOKENS
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    modality: `text`; `image` or `interleaved` draw, and the answer is then the JSON string {"text": ..., "images": [paths]}.
    output_dir: where pictures are written: one folder per task, one file per question, repetition and picture.
    final_answer: keep what follows "Answer:" (models that look first and then answer).
    yes_no: keep the first "yes" or "no" alone, for tasks that compare whole strings; a text with neither stays as it is.
    seed: of noise and sampling, together with a question's own name: draws do not depend on batch, order or process.
    guidance (None: the processor's own) to force_image: as in `generate`, for drawing.
    """

    modality: str = "text"
    output_dir: str | None = None
    final_answer: bool = False
    yes_no: bool = False
    seed: int = 0
    guidance: float | None = None
    text_guidance: float = 1.0
    image_guidance: float | None = None
    num_diffusion_steps: int | None = None
    max_images: int | None = None
    force_image: bool = False

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality={self.modality!r} is not one of {', '.join(MODALITIES)}")
        if self.modality != "text" and not self.output_dir:
            raise ValueError(f"modality={self.modality} draws pictures; name a folder of this run for them: output_dir=runs/x")
        given = [field.name for field in fields(self) if field.name in DRAWING and getattr(self, field.name) != field.default]
        if self.modality == "text" and given:
            raise ValueError(f"{', '.join(given)}: for drawing; add modality=interleaved or modality=image, or drop them")


@dataclass(frozen=True)
class Question:
    """One prompt. `task`, `doc_id`, `repeat` and `round` together are its name."""

    task: str
    doc_id: int | str
    turns: tuple[Turn, ...]
    repeat: int = 0
    round: int = 0

    @property
    def name(self) -> str:
        return f"{self.doc_id}-{self.repeat}" + (f"-round{self.round}" if self.round else "")


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Model arguments -> settings. Raises `ValueError` for an unknown one."""
    known = [field.name for field in fields(Settings)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"unknown model_args {', '.join(unknown)}; known: pretrained, device, dtype, batch_size, {', '.join(known)}"
        )
    return Settings(**options)


def decoding_of(options: Mapping[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
    """A task's `generation_kwargs` -> how to decode, and the names among them that mean nothing here.

    Sampling needs a temperature above 0 and no `do_sample: false`. Raises `ValueError` for values that cannot be.
    """
    given = {ALIASES.get(name, name): value for name, value in options.items() if value is not None}
    names = {field.name for field in fields(Decoding)}
    until = given.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"until={until!r}; give strings")
    kept: dict[str, Any] = {}
    for name in sorted(names & set(given) - {"do_sample"}):
        kind = float if name in ("temperature", "top_p") else int
        if isinstance(given[name], (str, bool)) or kind(given[name]) != given[name] or given[name] < 0:
            raise ValueError(
                f"generation option {name}={given[name]!r}; give {'a number' if kind is float else 'an integer'} >= 0"
            )
        kept[name] = kind(given[name])
    temperature = kept.get("temperature", 1.0 if given.get("do_sample") else 0.0)
    if given.get("do_sample", True) and temperature > 0:
        kept |= {"do_sample": True, "temperature": temperature}
    else:  # beams stay; what only sampling uses is reset, so that equal questions form one batch
        kept = {name: value for name, value in kept.items() if name in ("max_new_tokens", "num_beams")}
    return Decoding(until=tuple(stop for stop in until if stop), **kept), tuple(sorted(set(given) - names))


def turns_of(messages: Sequence[Mapping[str, Any]], max_pixels: int) -> tuple[Turn, ...]:
    """Chat messages of lmms-eval -> turns; the system's text becomes the beginning of the next user turn.

    Pictures may be files. Raises `ValueError` for video and sound, for links, and as [`orthus.prompts.chat_turns`].
    """
    conversation: list[dict[str, Any]] = []
    system: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
        if message["role"] == "system":
            system += [{"type": "text", "text": f"{part.get('text', '')}\n"} for part in parts]
            continue
        conversation.append({"role": message["role"], "content": [*system, *parts]})
        system = []
    if system:
        raise ValueError("a system message ends the conversation; a user's message must follow it")
    return tuple(chat_turns(conversation, max_pixels)[0])


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind, picture = part.get("type"), part.get("url", part.get("image"))
    if kind not in ("text", "image"):
        raise ValueError(f"the task shows a {kind}; Orthus reads text and pictures")
    if isinstance(picture, str) and "://" in picture:
        raise ValueError(f"the task shows the link {picture!r}; pictures are not downloaded here")
    return dict(part) if kind == "text" else {"type": "image", "image": picture}


def ended(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings in `until`."""
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def yes_or_no(text: str) -> str:
    """The first word of the text that is "yes" or "no", in lower case; all of a text that says neither."""
    found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return found.group().lower() if found else text


def seed_of(seed: int, question: Question) -> int:
    """Seed of one question, independent of batch, order and process."""
    digest = hashlib.sha256(f"{seed}/{question.task}/{question.name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Answerer:
    """A model that answers batches of questions with strings."""

    def __init__(self, model: "OrthusForConditionalGeneration", processor: "OrthusProcessor", settings: Settings) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self._limit: int | None = getattr(model.config.text_config, "max_position_embeddings", None)

    def answer(self, questions: Sequence[Question], decoding: Decoding) -> list[str]:
        """One string per question. A prompt that the model's positions cannot hold is answered with nothing, and a warning."""
        lengths = [len(self.processor.render(question.turns, add_generation_prompt=True).input_ids) for question in questions]
        least = self.processor.num_image_tokens + 2 if self.settings.modality != "text" else 1
        fitting = [self._limit is None or length + least <= self._limit for length in lengths]
        answers = iter(self._generate([q for q, fits in zip(questions, fitting, strict=True) if fits], decoding))
        found: list[str] = []
        for question, length, fits in zip(questions, lengths, fitting, strict=True):
            if not fits:
                logger.warning(
                    "%s %s: a prompt of %d positions leaves no room for an answer within %d; answered with nothing",
                    question.task, question.name, length, self._limit,
                )  # fmt: skip
            found.append(next(answers) if fits else self._written(question, [], decoding))
        return found

    def _generate(self, questions: Sequence[Question], decoding: Decoding) -> list[str]:
        if not questions:
            return []
        settings, device = self.settings, self.model.device
        turns = [list(question.turns) for question in questions]
        inputs: dict[str, Any] = {**self.processor(turns=turns)}
        options = {
            field.name: getattr(decoding, field.name) for field in fields(decoding) if field.name not in ("until", "num_beams")
        }
        if settings.modality == "text":
            options["num_beams"] = decoding.num_beams
        else:
            is_interleaved = settings.modality == "interleaved"
            weights = (settings.guidance, settings.image_guidance, settings.text_guidance)
            inputs |= self.processor.guidance_streams(turns, *weights, interleaved=is_interleaved)
            options |= {name: getattr(settings, name) for name in ("num_diffusion_steps", "max_images", "force_image")}
        width = max(value.shape[1] for name, value in inputs.items() if name.endswith("input_ids"))
        options["max_new_tokens"] = self._room(width, decoding.max_new_tokens)
        if settings.modality != "text" or decoding.do_sample:
            seeds = [seed_of(settings.seed, question) for question in questions]
            options["generator"] = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        output = self.model.generate(**inputs, modality=settings.modality, **options)
        said = self.processor.decode_segments(output)
        return [self._written(question, segments, decoding) for question, segments in zip(questions, said, strict=True)]

    def _room(self, width: int, num_text: int) -> int:
        """Positions that an answer to a prompt of `width` may take: those asked for its text and its pictures, if they fit."""
        settings = self.settings
        num_pictures = MAX_PICTURES[settings.modality] if settings.max_images is None else settings.max_images
        wanted = num_text + num_pictures * (self.processor.num_image_tokens + 2)
        if self._limit is None or width + wanted <= self._limit:
            return wanted
        logger.warning("a prompt of %d positions leaves %d of the %d asked for", width, self._limit - width, wanted)
        return self._limit - width

    def _written(self, question: Question, segments: Sequence[Any], decoding: Decoding) -> str:
        """Segments in the form that the harness grades; pictures are written to files."""
        text = ended(" ".join(segment for segment in segments if isinstance(segment, str)), decoding.until).strip()
        text = final_answer(text) if self.settings.final_answer else text
        text = yes_or_no(text) if self.settings.yes_no else text
        if self.settings.modality == "text":
            return text
        pictures = [segment for segment in segments if isinstance(segment, Image.Image)]
        paths = [str(self._save(question, number, picture)) for number, picture in enumerate(pictures)]
        return json.dumps({"text": text, "images": paths}, ensure_ascii=False)

    def _save(self, question: Question, number: int, picture: Image.Image) -> Path:
        """Whole or not at all, whoever else writes beside it."""
        folder = Path(str(self.settings.output_dir)).resolve() / question.task.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{question.name}-{number}.png"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        picture.save(temporary, format="PNG")
        os.replace(temporary, path)
        return path
