"""One self-contained HTML page of a run: tables, figures, and samples that sort and filter. No network, no library."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

THUMBNAIL = 160
STYLE = """
:root{color-scheme:light dark;--line:#8886;--right:#2a8a3a;--wrong:#c8442e}
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1180px;padding:0 1em}
table{border-collapse:collapse;margin:.6em 0 1.6em}td,th{border:1px solid var(--line);padding:3px 9px;text-align:right}
td:first-child,th:first-child{text-align:left}.grid{display:flex;flex-wrap:wrap;gap:10px}.note{opacity:.75;max-width:70em}
.item{width:176px;border:2px solid var(--line);border-radius:6px;padding:6px;font-size:12px;box-sizing:border-box}
.item.wide{width:362px}div.wide{overflow-x:auto}.right{border-color:var(--right)}.wrong{border-color:var(--wrong)}
.item img{max-width:160px;max-height:160px;border:1px solid var(--line)}.crisp{image-rendering:pixelated;width:128px;height:128px}
.reason{color:var(--wrong);white-space:pre-line}.controls{display:flex;flex-wrap:wrap;gap:12px;margin:1em 0}
.prompt{font-weight:600;min-height:2.9em}.verdict{float:right;opacity:.7;font-size:11px}
figure{margin:0 0 1.6em}figcaption{font-weight:600}.command{font:12px ui-monospace,monospace;overflow-wrap:anywhere}
"""
SCRIPT = """
const grid=document.querySelector('.grid'),items=[...document.querySelectorAll('.item')],el=i=>document.getElementById(i);
function show(){const want={task:el('task').value,verdict:el('verdict').value,bucket:el('bucket').value};
const text=el('text').value.toLowerCase(),by=el('sort').value;let n=0;
const value=e=>by==='order'?+e.dataset.order:by==='prompt'?e.title:e.dataset[by];
items.sort((a,b)=>{const x=value(a),y=value(b);return x<y?-1:x>y?1:a.dataset.order-b.dataset.order});
for(const e of items){const on=Object.entries(want).every(([k,v])=>v==='all'||e.dataset[k]===v)&&
e.textContent.toLowerCase().includes(text);e.hidden=!on;n+=on;grid.append(e)}
el('count').textContent=n+' of '+items.length+' shown'}
for(const id of ['task','verdict','bucket','sort'])el(id).addEventListener('change',show);
el('text').addEventListener('input',show);show();
"""


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first row of `rows` is its head."""

    title: str
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A titled inline SVG."""

    title: str
    svg: str


@dataclass(frozen=True)
class Sample:
    """One judged answer: texts and picture files in order, why it failed, and the kind of failure it belongs to."""

    task: str
    prompt: str
    verdict: str
    parts: tuple[str | Path, ...]
    reason: str = ""
    bucket: str = ""


def first_of_each(samples: Iterable[Sample], per_kind: int) -> list[Sample]:
    """At most `per_kind` samples of each task and verdict, the first ones."""
    seen: dict[tuple[str, str], int] = {}
    chosen = []
    for sample in samples:
        kind = (sample.task, sample.verdict)
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= per_kind:
            chosen.append(sample)
    return chosen


def page(
    title: str,
    source: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    samples: Sequence[Sample],
    num_samples: int | None = None,
) -> str:
    """The whole page. `source`: lines that say where it comes from, the command first. The pictures of `samples` go into it as
    thumbnails; `num_samples`: how many there are in all, where these are a part."""
    blocks = [_table(table) for table in tables]
    blocks += [f"<figure><figcaption>{html.escape(f.title)}</figcaption>{f.svg}</figure>" for f in figures]
    if samples:
        grid = "".join(_block(number, sample) for number, sample in enumerate(samples))
        part = (
            ""
            if num_samples in (None, len(samples))
            else f"<p class=note>The first of each task and verdict, of {num_samples}.</p>"
        )
        blocks.append(f"<h2>Samples</h2>{part}{_controls(samples)}<div class=grid>{grid}</div><script>{SCRIPT}</script>")
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p class=command>{'<br>'.join(map(html.escape, source))}</p>{''.join(blocks)}</html>\n"
    )


def _table(table: Table) -> str:
    head, *rows = table.rows

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}<div class=wide><table>"
        f"{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"
    )


def _controls(samples: Sequence[Sample]) -> str:
    def choice(name: str, value: Callable[[Sample], str], label: str = "") -> str:
        options = ["all", *sorted({value(sample) for sample in samples} - {""})]
        return _select(name, options, label)

    return (
        "<div class=controls>"
        + choice("task", lambda sample: sample.task)
        + choice("verdict", lambda sample: sample.verdict)
        + choice("bucket", lambda sample: sample.bucket, "kind of failure")
        + _select("sort", ["order", "task", "verdict", "bucket", "prompt"], "sorted by")
        + "<label>containing <input id=text type=search></label><output id=count></output></div>"
    )


def _select(name: str, options: Sequence[str], label: str = "") -> str:
    listed = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    return f"<label>{label or name} <select id={name}>{listed}</select></label>"


def _block(number: int, sample: Sample) -> str:
    parts = []
    for part in sample.parts:
        if isinstance(part, str):
            parts.append(f"<div>{html.escape(part)}</div>")
        else:
            with Image.open(part) as picture:
                crisp = " class=crisp" if picture.width < THUMBNAIL else ""
                parts.append(f'<img{crisp} alt="{html.escape(sample.prompt)}" src="{data_uri(picture)}">')
    kind = sample.verdict if sample.verdict in ("right", "wrong") else ""
    wide = " wide" if len(sample.parts) > 2 else ""
    escaped = {name: html.escape(getattr(sample, name)) for name in ("task", "verdict", "bucket", "prompt", "reason")}
    return (
        f'<div class="item {kind}{wide}" title="{escaped["prompt"]}" data-order={number} data-task="{escaped["task"]}"'
        f' data-verdict="{escaped["verdict"]}" data-bucket="{escaped["bucket"]}">'
        f"<div class=verdict>{escaped['verdict']}</div><div class=prompt>{escaped['prompt']}</div>"
        f"{''.join(parts)}<div class=reason>{escaped['reason']}</div></div>"
    )


def data_uri(picture: Image.Image) -> str:
    """A thumbnail as a data URI: small pictures enlarged without smoothing (PNG), large ones reduced (JPEG)."""
    rgb, buffer = picture.convert("RGB"), io.BytesIO()
    if rgb.width > THUMBNAIL:
        rgb.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        rgb.save(buffer, format="JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    rgb.quantize(64).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
