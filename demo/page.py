"""One self-contained HTML page of prompts and what a model made of them."""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.page import data_uri
from orthus.data.schema import Segment

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       background: #fff; color: #1b1b1f }
@media (prefers-color-scheme: dark) { body { background: #17171a; color: #e8e8ec } .item { border-color: #3a3a40 } }
h2 small { font-weight: normal; opacity: .6 }
.items { display: flex; flex-wrap: wrap; gap: 1rem }
.item { border: 1px solid #d8d8de; border-radius: 8px; padding: .8rem; flex: 0 1 auto }
.prompt { font-weight: 600; margin: 0 0 .5rem; max-width: 34rem }
.segments { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center }
img { width: 144px; height: 144px; image-rendering: pixelated; border-radius: 4px }
.said { max-width: 16rem }
"""


@dataclass(frozen=True)
class Item:
    """A prompt, and the segments that belong to it."""

    prompt: str
    segments: Sequence[Segment]


@dataclass(frozen=True)
class Section:
    """Items of one kind and the seconds that they took together."""

    title: str
    seconds: float
    items: Sequence[Item]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page atomically; pictures are embedded, nothing is fetched when it is opened."""
    body = "\n".join(_section(section) for section in sections)
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>"
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _section(section: Section) -> str:
    items = "".join(
        f'<div class="item"><p class="prompt">{html.escape(item.prompt)}</p>'
        f'<div class="segments">{"".join(map(_segment, item.segments))}</div></div>'
        for item in section.items
    )
    title = f"<h2>{html.escape(section.title)} <small>{section.seconds:.1f} s</small></h2>"
    return f'<section>{title}<div class="items">{items}</div></section>'


def _segment(segment: Segment) -> str:
    if isinstance(segment, str):
        return f'<span class="said">{html.escape(segment)}</span>'
    return f'<img alt="picture" src="{data_uri(segment)}">'
