"""What the app shows as HTML, and conversations as files to keep: HTML, Markdown and PNG in one ZIP."""

import base64
import html
import io
import zipfile
from collections.abc import Iterable, Sequence

from PIL import Image

from demo.app_desk import Draft, Drawn
from demo.page import STYLE
from orthus.data.schema import Segment, Turn

SHOWN_PIXELS = 192  # least width of a picture on the page
ROLE_NAMES = {"user": "You", "assistant": "Orthus"}


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def img(picture: Image.Image, alt: str, shown: int = SHOWN_PIXELS) -> str:
    """An `<img>` with its size, so that nothing moves when it arrives; small pictures are enlarged without smoothing."""
    width = max(shown, picture.width)
    height = round(width * picture.height / picture.width)
    crisp = ' class="crisp"' if picture.width < shown else ""
    return f'<img{crisp} src="{uri(png(picture))}" width="{width}" height="{height}" alt="{html.escape(alt, quote=True)}">'


def blank(shown: int = SHOWN_PIXELS) -> str:
    """The place of a picture that has not begun."""
    return f'<span class="blank" style="width:{shown}px" role="img" aria-label="not begun"></span>'


def parts_html(parts: Iterable[str | Drawn], about: str) -> str:
    """Text and pictures in order; `about` is what the pictures' descriptions say they are."""
    blocks = []
    for part in parts:
        if isinstance(part, str):
            if part.strip():
                blocks.append(f"<p>{_lines(part.strip())}</p>")
        else:
            alt = about if part.share == 1.0 else f"{about}, {part.share:.0%} drawn"
            blocks.append(f"<p>{img(part.picture, alt)}</p>")
    return "".join(blocks)


def _lines(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def as_parts(segments: Iterable[Segment]) -> list[str | Drawn]:
    return [segment if isinstance(segment, str) else Drawn(segment) for segment in segments]


def about(text: str) -> str:
    """A picture's description from what was asked for."""
    return f"picture: {text.strip()[:120]}" if text.strip() else "picture"


def words_of(segments: Iterable[Segment]) -> str:
    return " ".join(segment for segment in segments if isinstance(segment, str))


def bubble(role: str, body: str) -> str:
    return f'<article class="bubble {role}"><h3>{ROLE_NAMES[role]}</h3>{body}</article>'


def turns_html(turns: Sequence[Turn]) -> str:
    """A conversation as bubbles."""
    blocks, asked = [], ""
    for turn in turns:
        asked = words_of(turn.segments) if turn.role == "user" else asked
        blocks.append(bubble(turn.role, parts_html(as_parts(turn.segments), _alt(turn.role, asked))))
    return "".join(blocks)


def draft_html(draft: Draft, asked: str) -> str:
    """The answer that is being written."""
    body = parts_html(draft.parts, about(asked)) or '<p class="dots" aria-label="thinking">…</p>'
    note = '<p class="note">Stopped.</p>' if draft.is_stopped else ""
    return bubble("assistant", body + note)


def _alt(role: str, asked: str) -> str:
    return about(asked) if role == "assistant" else "your picture"


def status(note: str) -> str:
    return f'<p class="status" role="status">{html.escape(note)}</p>'


def download(name: str, data: bytes, label: str, kind: str = "application/zip") -> str:
    """A link that holds its file: nothing stays on the server."""
    return f'<a class="download" download="{html.escape(name, quote=True)}" href="{uri(data, kind)}">{html.escape(label)}</a>'


def archive(title: str, turns: Sequence[Turn]) -> bytes:
    """A ZIP of one HTML page that needs nothing else, the same as Markdown, and its pictures as PNG files."""
    files: dict[str, bytes] = {}
    lines, asked = [f"# {title}"], ""
    for turn in turns:
        asked = words_of(turn.segments) if turn.role == "user" else asked
        lines.append(f"**{ROLE_NAMES[turn.role]}**")
        for segment in turn.segments:
            if isinstance(segment, str):
                lines.append(_markdown(segment))
            else:
                name = f"picture-{len(files) + 1}.png"
                files[name] = png(segment)
                lines.append(f"![{_markdown(_alt(turn.role, asked)).replace(']', ' ')}]({name})")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{turns_html(turns)}</body></html>"
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("index.html", page)
        target.writestr("index.md", "\n\n".join(lines) + "\n")
        for name, data in files.items():
            target.writestr(name, data)
    return buffer.getvalue()


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#!|" else letter for letter in text)
