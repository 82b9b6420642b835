"""Results to read: one HTML page with samples, verdicts and intervals, and the Markdown tables of docs/RESULTS.md.

`python -m eval.report --run runs/eval-small --html runs/eval-small/report.html`
`python -m eval.report --results checkpoints/orthus-small/results.json --beside docs/results/*.json \
    --speed docs/results/speed/*.json --solvers docs/results/solvers/*.json --markdown docs/RESULTS.md`
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from eval.sampling_tables import solver_section, speed_section
from eval.statistics import interval_text

TABLES = (
    ("small_geneval", "Small GenEval"),
    ("small_geneval_direct", "Small GenEval, begin-of-image forced at once"),
    ("small_mme", "Small MME (accuracy)"),
    ("describing", "Descriptions (every object with class, colour and place)"),
    ("editing", "Editing"),
    ("interleaved", "Interleaved stories"),
)
MAIN_NUMBERS = (
    ("small_geneval", "overall", "SmallGenEval"),
    ("small_geneval_direct", "overall", "begin-of-image forced"),
    ("small_mme", "overall", "SmallMME accuracy"),
    ("small_mme", "acc_plus", "SmallMME acc+"),
    ("describing", "objects", "objects named right"),
    ("editing", "overall", "edits"),
    ("interleaved", "overall", "story pictures"),
)
THUMBNAIL = 128
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1100px;color:#222}
table{border-collapse:collapse;margin:.6em 0 1.6em}td,th{border:1px solid #ccc;padding:3px 9px;text-align:right}
td:first-child,th:first-child{text-align:left}.grid{display:flex;flex-wrap:wrap;gap:10px}
.item{width:150px;border:2px solid #c33;border-radius:6px;padding:6px;font-size:12px}.item.right{border-color:#2a2}
.item img{image-rendering:pixelated;width:128px;height:128px;border:1px solid #ddd}.reason{color:#a00;white-space:pre-line}
"""
SCRIPT = """
function show(){const t=document.getElementById('task').value,v=document.getElementById('verdict').value;let n=0;
for(const e of document.querySelectorAll('.item')){const on=(t==='all'||e.dataset.task===t)&&(v==='all'||e.dataset.verdict===v);
e.style.display=on?'':'none';n+=on}document.getElementById('count').textContent=n+' shown'}
for(const id of ['task','verdict'])document.getElementById(id).addEventListener('change',show);show();
"""


def rows_of(section: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, interval) of everything in a section that has a value with bounds, overall first."""
    rows = [(name, cell) for name, cell in section.items() if isinstance(cell, Mapping) and "low" in cell]
    return sorted(rows, key=lambda row: row[0] != "overall")


def floor_text(results: Mapping[str, Any], section: str, row: str) -> str:
    """The baselines that belong to one row."""
    floors = results.get("floors", {}).get(section, {})
    if section == "small_geneval":
        names = ("random_placement", "random_colors", "random_count", "unrelated")
        return ", ".join(f"{n.replace('_', ' ')} {floors[n][row]:.2f}" for n in names if row in floors.get(n, {}))
    if section == "small_mme":
        key = {"overall": ("acc", "overall"), "acc_plus": ("acc_plus",), "score": ("score",)}.get(row, ())
        found = [(n, f[k]) for n, f in floors.items() for k in key if k in f]
        return ", ".join(f"{name.replace('_', ' ')} {value:.{1 if value > 2 else 2}f}" for name, value in found)
    return ""


def _tables(results: Mapping[str, Any]) -> Iterable[tuple[str, list[list[str]]]]:
    """(title, rows of cells) of each section that the results hold."""
    for section, title in TABLES:
        if section in results:
            rows = [
                [name.replace("_", " "), interval_text(cell), str(cell["n"]), floor_text(results, section, name)]
                for name, cell in rows_of(results[section])
            ]
            yield title, rows
    if "grader" in results:
        rows = [
            [tag.replace("_", " "), f"{c['agreement']:.4f}", str(c["n"]), f"second grader differs {c['disagreement']:.3f}"]
            for tag, c in results["grader"].items()
        ]
        yield "Grader against ground truth after the autoencoder round trip (verdict agreement)", rows


def side_by_side(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A Markdown table of the main numbers: a row for each result, a column for each section that one of them holds."""
    columns = [(title, section, row) for section, row, title in MAIN_NUMBERS if any(section in r for r in results.values())]
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, result in results.items():
        cells = [interval_text(result[section][row]) if section in result else "" for _, section, row in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def markdown(
    results: Mapping[str, Mapping[str, Any]],
    beside: Mapping[str, Mapping[str, Any]],
    speed: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    solvers: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """docs/RESULTS.md (generated: never edit it by hand) from results by name; of those `beside` only the main numbers."""
    lines = ["# Results", "", "Generated by `python -m eval.report --markdown`; do not edit. Intervals are 95 %, percentile"]
    lines += ["bootstrap over prompts or pictures, stratified by task. SmallGenEval and SmallMME are this project's own"]
    lines += ["benchmarks on the small world: their numbers do not compare with GenEval or MME.", ""]
    if beside:
        lines += ["## Side by side", "", *side_by_side({**results, **beside}), ""]
        lines += [f"- {name}: `{result.get('command')}`, commit {result.get('commit')}" for name, result in beside.items()] + [""]
    for name, result in results.items():
        lines += [f"## {name}", ""]
        for title, rows in _tables(result):
            lines += [f"### {title}", "", "| | value | n | floors |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        lines += [f"- command: `{result.get('command', 'unknown')}`"]
        for key in ("commit", "seed", "weights_sha256", "held_out_fingerprint", "hardware"):
            lines += [f"- {key.replace('_', ' ')}: {result.get(key, 'unknown')}"]
        for key in ("versions", "seconds", "decoding"):
            lines += [f"- {key}: `{json.dumps(result.get(key, {}))}`"]
        lines += [""]
    for title, section, found in (("Speed", speed_section, speed), ("Samplers", solver_section, solvers)):
        lines += [f"## {title}", ""] if found else []
        lines += [line for name, result in found.items() for line in section(name, result)]
    return "\n".join(lines)


def data_uri(image: Image.Image) -> str:
    """A picture enlarged without smoothing to about 128 px, as a PNG data URI."""
    factor = max(1, round(THUMBNAIL / image.width))
    crisp = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    crisp.convert("RGB").quantize(64).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(results: Mapping[str, Any], run: Path, per_task: int = 24) -> str:
    """One self-contained page: tables, and up to `per_task` samples of each task with prompt, verdict and reason."""
    tables = "".join(
        f"<h2>{html.escape(title)}</h2><table><tr><th></th><th>value</th><th>n</th><th>floors</th></tr>"
        + "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        + "</table>"
        for title, rows in _tables(results)
    )
    items = [item for task in ("geneval", "edit", "story") for item in _items(run, task, per_task)]
    tasks = sorted({task for task, _ in items})
    options = "".join(f"<option>{html.escape(task)}</option>" for task in ("all", *tasks))
    controls = (
        f"<p>task <select id=task>{options}</select> verdict <select id=verdict><option>all</option>"
        "<option>right</option><option>wrong</option></select> <span id=count></span></p>"
    )
    grid = "".join(block for _, block in items)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Small-world report</title>"
        f"<style>{STYLE}</style><h1>Small-world report</h1><p>{html.escape(str(results.get('command', '')))}</p>"
        f"{tables}<h2>Samples</h2>{controls}<div class=grid>{grid}</div><script>{SCRIPT}</script></html>\n"
    )


def _items(run: Path, task: str, per_task: int) -> list[tuple[str, str]]:
    """(task name, HTML) of the first samples of each kind."""
    grades = run / f"grades-{task}.jsonl"
    if not grades.exists():
        return []
    records = [json.loads(line) for line in grades.read_text(encoding="utf-8").splitlines()]
    answers = {r["key"]: r for r in map(json.loads, (run / f"{task}.jsonl").read_text(encoding="utf-8").splitlines())}
    shown: dict[str, int] = {}
    blocks = []
    for record in records:
        name = f"{task}: {record['tag']}" if task != "geneval" else record["tag"]
        shown[name] = shown.get(name, 0) + 1
        if shown[name] <= per_task:
            blocks.append((name, _block(name, record, answers[record["key"]], run)))
    return blocks


def _block(name: str, record: Mapping[str, Any], answer: Mapping[str, Any], run: Path) -> str:
    is_right = bool(record.get("correct", record.get("all_right")))
    parts = []
    for segment in answer["segments"]:
        if "text" in segment:
            parts.append(f"<div>{html.escape(segment['text'])}</div>")
        else:
            with Image.open(run / segment["image"]) as image:
                parts.append(f'<img alt="{html.escape(record["prompt"])}" src="{data_uri(image)}">')
    verdict = "right" if is_right else "wrong"
    return (
        f'<div class="item {verdict}" data-task="{html.escape(name)}" data-verdict="{verdict}">'
        f"<div><b>{html.escape(record['prompt'])}</b></div>{''.join(parts)}"
        f'<div class="reason">{html.escape(_reason(record))}</div></div>'
    )


def _reason(record: Mapping[str, Any]) -> str:
    if "reason" in record:
        return str(record["reason"])
    if "pictures" in record:
        return f"pictures right: {sum(record['pictures'])} of {len(record['pictures'])}; form {record['form']}"
    return "" if record["correct"] else f"changed: {record['changed']}, kept: {record['kept']}"


def load(paths: Sequence[str]) -> dict[str, Any]:
    """Results by name: that of the file, or of its folder for a `results.json`."""
    files = [Path(path) for path in paths]
    names = [file.parent.name if file.stem == "results" else file.stem for file in files]
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in zip(names, files, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="*", default=[], help="results.json files for --markdown")
    parser.add_argument("--beside", nargs="*", default=[], help="results of which --markdown shows the main numbers only")
    parser.add_argument("--speed", nargs="*", default=[], help="results of eval.speed for --markdown")
    parser.add_argument("--solvers", nargs="*", default=[], help="results of eval.solver_curves for --markdown")
    parser.add_argument("--markdown", help="Markdown file to write")
    parser.add_argument("--run", help="output folder of eval.small_world, for --html")
    parser.add_argument("--html", help="HTML page to write")
    options = parser.parse_args(argv)
    files = [options.results, options.beside, options.speed, options.solvers]
    if options.markdown and not any(files):
        parser.error("--markdown needs --results, --beside, --speed or --solvers FILE ...")
    if options.html and not options.run:
        parser.error("--html needs --run FOLDER")
    if options.markdown:
        Path(options.markdown).write_text(markdown(*map(load, files)), encoding="utf-8")
    if options.html:
        run = Path(options.run)
        results_file = run / "results.json"
        result = json.loads(results_file.read_text(encoding="utf-8")) if results_file.exists() else {}
        Path(options.html).write_text(page(result, run), encoding="utf-8")


if __name__ == "__main__":
    main()
