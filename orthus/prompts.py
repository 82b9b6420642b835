"""What callers may pass (segments, texts with image tokens, chat messages) -> turns, without any chat template."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orthus.data.schema import Turn
from orthus.image_processing import array_to_image, flatten_images, load_image


def as_batch(turns: Any) -> list[list[Turn]]:
    """Turns of one prompt, or a batch of such lists -> a batch. Raises `ValueError` for anything else."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"turns is a {type(turns).__name__}; pass a list of Turn, or a list of such lists")
    if not turns:
        raise ValueError("empty prompt: turns is empty; pass at least one user turn")
    batch = [list(turns)] if isinstance(turns[0], Turn) else [list(row) for row in turns]
    kinds = {type(turn).__name__ for row in batch for turn in row if not isinstance(turn, Turn)}
    if kinds:
        raise ValueError(f"turns holds {sorted(kinds)}; pass a list of Turn, or a list of such lists")
    return batch


def as_rows(segments: Any) -> list[Sequence[Any]]:
    """Segments of one prompt, or a batch of such lists -> a batch. Raises `ValueError` for anything else."""
    if not isinstance(segments, (list, tuple)):
        raise ValueError(f"segments is a {type(segments).__name__}; pass a list of text and pictures")
    if not segments:
        raise ValueError("empty prompt: segments is empty; pass some text or a picture")
    is_batch = [isinstance(entry, (list, tuple)) for entry in segments]
    if any(is_batch) and not all(is_batch):
        raise ValueError("segments mixes segments and lists of segments; pass one list, or a list of lists")
    return list(segments) if all(is_batch) else [segments]


def interleave(text: Any, images: Any, image_token: str) -> list[list[Any]]:
    """Texts with image tokens and a flat or nested list of pictures -> one list of segments per text.

    Raises `ValueError` unless there are as many pictures as image tokens: in all, and for nested `images` in each text.
    """
    texts = list(text) if isinstance(text, (list, tuple)) else [text]
    if not texts or any(not isinstance(entry, str) for entry in texts):
        raise ValueError(f"text = {text!r}; pass a string or a list of strings")
    flat = [] if images is None else flatten_images(images)
    counts = [entry.count(image_token) for entry in texts]
    if sum(counts) != len(flat):
        raise ValueError(f"text holds {sum(counts)} {image_token} but there are {len(flat)} images; pass one for each")
    if isinstance(images, (list, tuple)) and images and all(isinstance(entry, (list, tuple)) for entry in images):
        if [len(entry) for entry in images] != counts:
            raise ValueError(f"texts hold {counts} {image_token} but images {[len(entry) for entry in images]}")
    if any(isinstance(image, (str, os.PathLike)) for image in flat):
        raise ValueError(f"images holds {flat!r}; a path is never opened here: pass pictures, e.g. load_image(path)")
    remaining = iter(flat)
    rows: list[list[Any]] = []
    for entry in texts:
        first, *others = entry.split(image_token)
        rows.append([first])
        for piece in others:
            rows[-1] += [next(remaining), piece]
    return rows


def user_turn(segments: Sequence[Any]) -> Turn:
    """As `Turn("user", segments)`, pictures may be uint8 arrays or tensors too. Raises `ValueError` for other types."""
    return _turn("user", segments)


def chat_turns(conversation: Any, max_pixels: int) -> list[list[Turn]]:
    """Chat messages, or a batch of such lists -> a batch of turns; image files are read.

    Raises `ValueError` for unknown roles and content, and as `load_image`.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"empty prompt: conversation = {conversation!r}; pass a list with at least one user message")
    batch = [conversation] if isinstance(conversation[0], Mapping) else conversation
    return [[_message_turn(message, max_pixels) for message in row] for row in batch]


def _message_turn(message: Any, max_pixels: int) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a {type(message).__name__}; pass {{'role': ..., 'content': ...}}")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise ValueError(f"message role = {role!r}; use user or assistant (put system text into a user message)")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"content = {content!r}; pass text or a list of {{'type': ...}} parts")
    return _turn(role, [_message_segment(part, max_pixels) for part in parts])


def _turn(role: Any, segments: Sequence[Any]) -> Turn:
    if not segments:
        raise ValueError(f"empty prompt: the {role} turn has no content; pass some text or a picture")
    arrays = (np.ndarray, torch.Tensor)
    try:
        return Turn(role, tuple(array_to_image(part) if isinstance(part, arrays) else part for part in segments))
    except TypeError as error:
        raise ValueError(f"{error} (open files with load_image(path))") from error


def _message_segment(part: Mapping[str, Any], max_pixels: int) -> Any:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    picture = part.get("image", part.get("path"))
    if kind != "image" or picture is None:
        raise ValueError(
            f"content of type {kind!r} with keys {sorted(part)} is not supported; "
            "pass {'type': 'text', 'text': ...} or {'type': 'image', 'image': picture or path}"
        )
    return load_image(picture, max_pixels) if isinstance(picture, (str, os.PathLike)) else picture
