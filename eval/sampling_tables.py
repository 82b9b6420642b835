"""Markdown sections of docs/RESULTS.md on drawing: results of `eval.speed` and of `eval.solver_curves`."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.statistics import interval_text

RATIOS = (
    ("exact_ratio_batch1", "published sampler, batch 1"),
    ("exact_ratio_batch8", "published sampler, batch 8"),
    ("exact_ratio_batch16", "published sampler, batch 16"),
    ("bf16_ratio_batch32", "published sampler, batch 32 in bf16"),
    ("default_ratio_batch1", "default sampler, batch 1"),
)


def speed_section(name: str, result: Mapping[str, Any]) -> list[str]:
    """Lines of one result of `python -m eval.speed`, or of `eval.training_speed`."""
    if "real_tokens_per_second" in result:
        return _training_section(name, result)
    lines = [f"### {name}", "", "| | times as fast, per image |", "|---|---|"]
    lines += [f"| {title} | {result[key]:.1f} |" for key, title in RATIOS if key in result]
    lines += ["", "| sampler | batch | type | s per image | ms per latent at | head | of bandwidth | of matrix rate |"]
    lines += ["|---" * 8 + "|"]
    lines += [_speed_row(one) for one in result["configurations"]]
    ceilings = result["ceilings"]
    rates = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in ceilings["gflop_per_s"].items())
    lines += ["", f"- measured in the same run: {ceilings['bandwidth_gb_per_s']:.1f} GB/s, {rates}"]
    if "reference_seconds_per_image" in result:
        both = " and ".join(f"{seconds:.0f}" for seconds in result["reference_seconds_per_image"])
        lines += [f"- reference loop, first and last in the run: {both} s per image; the faster counts"]
    for key in ("position_ratio_1024_64", "bandwidth_floor_ratio", "max_abs_image_difference"):
        if key in result:
            compared = f" (first {result['num_compared']} latents of an image)" if key == "max_abs_image_difference" else ""
            lines += [f"- {key.replace('_', ' ')}: {result[key]:.3g}{compared}"]
    hardware = ", ".join(str(value) for value in result["hardware"].values())
    lines += [f"- command: `{result['command']}`, commit {result['commit']}", f"- {hardware}, {result['threads']} threads"]
    return [*lines, ""]


def _training_section(name: str, result: Mapping[str, Any]) -> list[str]:
    lines = [f"### {name}", "", "| | real tokens per second | of all tokens are real |", "|---|---|---|"]
    speeds, shares = result["real_tokens_per_second"], result["real_share"]
    lines += [f"| {way} | {speeds[way]:.0f} | {shares[way]:.1%} |" for way in speeds]
    lines += ["", f"- ratio: {result['ratio']:.2f}", f"- command: `{result['command']}`, commit {result['commit']}"]
    return [*lines, f"- {result['hardware']}", ""]


def _speed_row(one: Mapping[str, Any]) -> str:
    places = ", ".join(f"{place}: {1000 * seconds:.0f}" for place, seconds in one["seconds_per_latent"].items())
    last = list(one["positions"].values())[-1]
    sampler = {"grid": "", "default": "default: ", "exact": "", "reference": "reference loop: "}[one["name"]]
    sampler += f"{one['solver'] or ''} {one['num_diffusion_steps']}"
    cells = [sampler, one["batch"], one["dtype"], f"{one['seconds_per_image']:.1f}", places]
    cells += [f"{last['head'] / last['total']:.0%}", f"{last['bandwidth_fraction']:.0%}", f"{last['rate_fraction']:.0%}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def solver_section(name: str, result: Mapping[str, Any]) -> list[str]:
    """Lines of one result of `python -m eval.solver_curves`."""
    settings = result["settings"]
    lines = [f"### {name} ({result['objective']})", "", f"![curves](solvers-{name}.png)", ""]
    lines += _error_table(settings, result["error"])
    task = "planned in words first" if settings["score_task"] == "geneval" else "begin-of-image forced at once"
    lines += [f"SmallGenEval, {task}; guidance {settings['guidance']:g} unless named:", ""]
    lines += ["| sampler | evaluations | score | difference to the exact sampler |", "|---|---|---|---|"]
    for point in result["score"]:
        title = point["key"].removeprefix("score/")
        cells = [title, f"{point['mean_evaluations']:.1f}", interval_text(point["score"]), interval_text(point["difference"])]
        lines.append("| " + " | ".join(cells) + " |")
    found = result.get("cheapest_neutral")
    if found:
        sampler = f"{found['solver']}, {found['spacing']}, {found['num_diffusion_steps']} evaluations"
        lines += ["", f"- cheapest neutral sampler (score within the interval of the exact one, error no larger): {sampler}"]
    return [*lines, f"- command: `{result['command']}`, commit {result['commit']}", ""]


def _error_table(settings: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """RMS error by guidance and sampler against evaluations."""
    steps = settings["error_steps"]
    lines = [f"RMS error against {settings['reference_steps']} DDIM evaluations from the same noise, latents of variance 1:", ""]
    lines += ["| guidance | solver | spacing | " + " | ".join(map(str, steps)) + " |", "|---" * (3 + len(steps)) + "|"]
    rows: dict[tuple[Any, ...], dict[int, Any]] = {}
    for point in points:
        row = rows.setdefault((f"{point['guidance']:g}", point["solver"], point["spacing"]), {})
        row[point["num_diffusion_steps"]] = point.get("rms")
    for key, row in rows.items():
        cells = ["" if row.get(num) is None else f"{row[num]:.4f}" for num in steps]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return [*lines, ""]
