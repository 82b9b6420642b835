"""Records -> turns, one function for each form that data comes in; turns are those in which the model is prompted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from PIL import Image

from orthus.data.schema import Role, Segment, Turn
from orthus.data.sources.records import Record, clean
from orthus.data.sources.settings import NAMES, SourceSettings
from orthus.data.world.captions import DESCRIBE

Picture = Callable[[Any], Image.Image]
IMAGE_MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def drawn_caption(record: Record, picture: Picture) -> list[Turn]:
    """user: caption; assistant: picture."""
    return [Turn("user", (record.text("caption"),)), Turn("assistant", (picture(record.need("image")),))]


def described_picture(record: Record, picture: Picture, prompt: str = DESCRIBE) -> list[Turn]:
    """user: picture and the request to describe it; assistant: caption."""
    caption = record.text("caption")
    return [Turn("user", (picture(record.need("image")), prompt)), Turn("assistant", (caption,))]


def edit(record: Record, picture: Picture) -> list[Turn]:
    """user: picture and instruction; assistant: the edited picture."""
    instruction = record.text("instruction")
    before, after = picture(record.need("source")), picture(record.need("target"))
    return [Turn("user", (before, instruction)), Turn("assistant", (after,))]


def text(record: Record, picture: Picture, prompt: str | None = None) -> list[Turn]:
    """assistant: the text, after the user's prompt if there is one; else the text alone, learned from its first word."""
    said = Turn("assistant", (record.text("text"),))
    return [Turn("user", (prompt,)), said] if prompt else [said]


# -- documents -----------------------------------------------------------------------------------------------------


def document(record: Record, picture: Picture, prompt: str) -> list[Turn]:
    """user: the prompt without a condition; assistant: text and pictures in reading order.

    OBELICS: `images[i]` or `texts[i]` is what stands at place i; where both are null something was filtered. MMC4: a picture goes
    after the sentence that it was matched to, as this model says what it draws before it draws it.
    """
    if record.find("text_list") is not None:
        parts, joint = _mmc4(record), " "
    else:
        parts, joint = _obelics(record), "\n\n"
    segments: list[Segment] = []
    for value, is_text in parts:
        if not is_text:
            segments.append(picture(value))
        elif isinstance(value, str) and not value.strip():
            continue
        elif segments and isinstance(segments[-1], str):
            segments[-1] += joint + clean(value, "text")
        else:
            segments.append(clean(value, "text"))
    if not segments:
        raise ValueError("the document has neither text nor pictures")
    return [Turn("user", (prompt,)), Turn("assistant", tuple(segments))]


def _mmc4(record: Record) -> list[tuple[Any, bool]]:
    sentences, pictures = record.list("text_list"), record.list("image_info")
    after: list[list[Any]] = [[] for _ in sentences]
    for number, info in enumerate(pictures):
        place = info.get("matched_text_index") if isinstance(info, Mapping) else None
        if not isinstance(place, int) or not 0 <= place < len(sentences):
            raise ValueError(f"picture {number} is matched to text {place!r} of {len(sentences)}")
        after[place].append(info.get("image_name"))
    return [part for sentence, names in zip(sentences, after, strict=True)
            for part in [(sentence, True), *((name, False) for name in names)]]  # fmt: skip


def _obelics(record: Record) -> list[tuple[Any, bool]]:
    pictures, texts = record.list("images"), record.list("texts")
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} images stand beside {len(texts)} texts")
    both = zip(texts, pictures, strict=True)
    return [part for words, shown in both for part in ((words, True), (shown, False)) if part[0] is not None]


# -- conversations -------------------------------------------------------------------------------------------------

Piece = tuple[bool, Any]  # is it a picture; the text or picture, None for the record's next picture


def conversation(record: Record, picture: Picture) -> list[Turn]:
    """The turns as they are, a picture at each mark `<image>`. System text opens the user's first turn."""
    values = record.find("image")
    pictures = values if isinstance(values, list) else [] if values in (None, "") else [values]
    messages = [_message(value, number) for number, value in enumerate(record.list("conversations"))]
    needed = sum(is_picture and value is None for _, pieces in messages for is_picture, value in pieces)
    if needed != len(pictures):
        raise ValueError(f"{needed} marks {IMAGE_MARK} for {len(pictures)} pictures")
    if len(messages) > 1 and messages[0][0] == "system":
        (_, system), (role, pieces), *others = messages
        messages = [(role, [*system, *pieces]), *others]
    for number, (role, _) in enumerate(messages):
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(f"turn {number} is the {role}'s; user and assistant take turns, the user begins")
    if not messages or len(messages) % 2:
        raise ValueError("no assistant's turn at the end")
    rest = iter(pictures)
    return [Turn(cast(Role, role), tuple(_segment(piece, rest, picture) for piece in pieces)) for role, pieces in messages]


def _message(message: Any, number: int) -> tuple[str, list[Piece]]:
    if not isinstance(message, Mapping):
        raise ValueError(f"turn {number} is a {type(message).__name__}, not an object")
    speaker = message.get("from") or message.get("role")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"turn {number} is of {speaker!r}; known are {', '.join(ROLES)}")
    content = message.get("value") or message.get("content")
    pieces: list[Piece] = []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if isinstance(part, Mapping) and part.get("type") == "image":
            pieces.append((True, part.get("image") or part.get("path")))
        elif isinstance(part, Mapping) and part.get("type") == "text":
            pieces += _marked(clean(part.get("text"), f"turn {number}"))
        else:
            raise ValueError(f"turn {number} holds {str(part)[:80]}, neither text nor image")
    if not pieces:
        raise ValueError(f"empty turn {number}")
    return ROLES[speaker], pieces


def _marked(words: str) -> list[Piece]:
    pieces: list[Piece] = []
    for place, part in enumerate(words.split(IMAGE_MARK)):
        pieces += [(True, None)] if place else []
        pieces += [(False, part.strip())] if part.strip() else []
    return pieces


def _segment(piece: Piece, rest: Iterator[Any], picture: Picture) -> Segment:
    is_picture, value = piece
    if is_picture:
        return picture(next(rest) if value is None else value)
    return value


# -- which form ----------------------------------------------------------------------------------------------------

Form = Callable[[Record, Picture], list[Turn]]
# Told from the columns of a table, in this order: the fields that a form needs, and the kind of source that it is.
NEEDED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("conversations",), "llava"),
    (("source", "instruction", "target"), "editing"),
    (("images", "texts"), "interleaved"),
    (("text_list", "image_info"), "interleaved"),
    (("image", "caption"), "webdataset"),
    (("text",), "text"),
)
OPTIONAL = {"llava": ("image",)}


def fields_in(columns: Sequence[str], names: Mapping[str, str], kind: str) -> tuple[str, tuple[str, ...]]:
    """The kind of form that a table with these columns has, "parquet" being any, and the fields it is read from.

    Raises ValueError if it has none, or not that of `kind`.
    """
    there = {field for field in NAMES if set(Record({}, names).names(field)) & set(columns)}
    for needed, form in NEEDED:
        if kind in ("parquet", form) and there.issuperset(needed):
            return form, (*needed, *OPTIONAL.get(form, ()))
    wanted = "; ".join(" + ".join(needed) for needed, form in NEEDED if kind in ("parquet", form))
    raise ValueError(f"the columns {', '.join(columns)} hold none of: {wanted}; name them in `columns`")


def form_of(settings: SourceSettings, kind: str, document_prompt: str) -> Form:
    """How records of that kind become turns. ValueError for a setting that would do nothing."""
    if settings.answer == "text" and kind != "webdataset":
        raise ValueError(f"{settings.path}: answer='text' is for pictures with captions, not for {kind}")
    if kind == "webdataset" and settings.answer == "text":
        return partial(described_picture, prompt=settings.prompt or DESCRIBE)
    if kind == "interleaved":
        return partial(document, prompt=settings.prompt or document_prompt)
    if kind == "text":
        return partial(text, prompt=settings.prompt)
    if settings.prompt is not None:
        raise ValueError(f"{settings.path}: prompt has no place in {kind}, where the user's words are in the data")
    return {"webdataset": drawn_caption, "llava": conversation, "editing": edit}[kind]
