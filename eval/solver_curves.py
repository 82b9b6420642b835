"""How few evaluations of the diffusion head a latent needs: error and score of one model against solver, spacing, number of
evaluations, guidance and step schedule. The same command resumes.

`python -m eval.solver_curves model=checkpoints/orthus-small output=runs/curves [parts=[error] num_per_task=40 ...]`
writes a line per point to `points.jsonl`, and `results.json` and `curves.png`, under `output`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from eval import small_world
from eval.answers import read_records
from eval.geneval.records import read_results
from eval.provenance import check_manifest, from_command_line, provenance
from eval.small_reports import report_geneval
from eval.solver_figures import write_figure
from eval.statistics import Task, paired_bootstrap
from eval.whole_files import write_json
from orthus.data.schema import Turn
from orthus.data.world.benchmark import small_geneval_items
from orthus.data.world.dataset import WorldDataset
from orthus.diffusion import SPACINGS
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor
from orthus.sampling import LatentSampler, Sampling
from orthus.training.settings import to_dict

PARTS = ("error", "score")
SOLVERS = ("ddim", "dpm++2m", "heun")  # "euler" is flow matching's name for the same step as "ddim"
Point = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured; see `python -m eval.solver_curves --help`.

    parts: error (against `reference_steps` DDIM evaluations from the same noise), score (SmallGenEval).
    score_task: geneval_direct: begin-of-image is forced at once, so that the latents decide all that is scored; geneval: the
        model plans in words first, after which a picture survives almost any sampler.
    num_pictures: real pictures whose hidden states and latents, teacher-forced, the error is measured on.
    error_steps, error_guidance: numbers of evaluations and guidance weights of the error.
    score_steps: numbers of evaluations of the score, each with the spacing of smaller error; some of `error_steps`.
    score_guidance: weights at which the model's own sampler is scored, besides `guidance`.
    last_steps: to which the numbers of evaluations of the model's own sampler fall over an image.
    exact_steps: of the DDIM run that others are held against, in error and in score.
    num_per_task: prompts of each of the six tasks of SmallGenEval.
    guidance, text_guidance, guidance_interval: as in `eval.small_world`; the last also of the error.
    """

    model: str
    output: str = "runs/curves"
    parts: tuple[str, ...] = PARTS
    score_task: Literal["geneval", "geneval_direct"] = "geneval_direct"
    num_pictures: int = 16
    reference_steps: int = 1000
    error_steps: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100)
    error_guidance: tuple[float, ...] = (1.0, 2.0, 5.0)
    score_steps: tuple[int, ...] = (2, 4, 8, 15, 20)
    score_guidance: tuple[float, ...] = (1.0, 1.5, 3.0, 5.0)
    last_steps: tuple[int, ...] = (1, 4, 10)
    exact_steps: int = 100
    num_per_task: int = 40
    guidance: float = 2.0
    text_guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 0.85)
    seed: int = 0
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"part {part!r} is unknown; use some of {', '.join(PARTS)}")
        for name in ("num_pictures", "reference_steps", "exact_steps", "error_steps", "score_steps", "last_steps"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number < 1:
                    raise ValueError(f"{name}={number}; give at least 1")
        missing = sorted({*self.score_steps, self.exact_steps} - {*self.error_steps})
        if missing:
            raise ValueError(f"error_steps lack {', '.join(map(str, missing))}, which score_steps or exact_steps need; add them")
        if self.guidance not in self.error_guidance:
            raise ValueError(f"error_guidance={list(self.error_guidance)} lacks guidance={self.guidance:g}; add it")
        if "score" in self.parts and "error" not in self.parts:
            raise ValueError("parts=[score] has no errors by which to choose spacings; let parts=[error, score]")
        scored(self, {}, "")  # checks the settings that it takes over


FREE = ("output", "device", "parts", "error_steps", "error_guidance", "score_steps", "score_guidance", "last_steps")
"""What may change between runs in one folder: which points are measured, not what they are."""


def scored(settings: Settings, options: Mapping[str, Any], name: str) -> small_world.Settings:
    """The run of `eval.small_world` behind one score; `options`: guidance and fields of [`Sampling`]."""
    names = ("num_per_task", "guidance", "text_guidance", "guidance_interval", "seed", "batch_size", "device")
    same = {field: getattr(settings, field) for field in names}
    return small_world.Settings(settings.model, f"{settings.output}/{name}", (settings.score_task,), **{**same, **options})


# ------------------------------------------------------------------ points


def measured(path: Path, wanted: Mapping[str, Callable[[], Point]], title: str) -> dict[str, Point]:
    """The points of a file by key, after those of `wanted` that it lacks are measured and appended one by one."""
    points = read_records(path)
    for key in tqdm([key for key in wanted if key not in points], desc=title, unit="point"):
        points[key] = {"key": key, **wanted[key]()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(points[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return {key: points[key] for key in wanted}


@torch.no_grad()
def hidden_states(model: Any, processor: Any, num_pictures: int) -> Tensor:
    """`(2, N, D)`: hidden states that predict the latents of real pictures, after prompt and plan and after the unconditional
    prompt, as `generate` would have them had it drawn these very latents."""
    dataset = WorldDataset("validation", {"t2i": 1.0}, plans=1.0)
    unconditional, places = Turn("user", (processor.unconditional_prompt,)), model.config.num_latents
    columns = []
    for index in range(num_pictures):
        turns = dataset[index].turns
        streams = []
        for conversation in (turns, (unconditional, Turn("assistant", turns[-1].segments[-1:]))):
            rendered = processor.render(conversation)
            ids = torch.tensor([rendered.input_ids], device=model.device)
            pixel_values = processor.image_processor.pixel_values(rendered.images).to(model.device)
            hidden = model(ids, pixel_values=pixel_values, logits_to_keep=1).last_hidden_state[0]
            is_latent = ids[0] == model.config.image_token_id
            assert int(is_latent.sum()) == places
            streams.append(hidden[is_latent.nonzero()[:, 0] - 1])
        columns.append(torch.stack(streams))
    return torch.cat(columns, dim=1)


class Errors:
    """Distances of latents drawn in few evaluations from those drawn in many, from the same noise."""

    def __init__(self, model: Any, processor: Any, settings: Settings) -> None:
        self.head, self.settings = model.diffusion_head, settings
        self.streams = hidden_states(model, processor, settings.num_pictures)
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (self.streams.shape[1], model.config.head_config.latent_dim)
        self.noise = torch.randn(shape, generator=generator).to(model.device)

    def draw(self, guidance: float, solver: str, spacing: str, num_steps: int) -> Tensor:
        """Latents `(N, C)` in the head's scaled units, in which noise has spread 1."""
        sampling = Sampling(solver, num_steps, spacing, guidance_interval=self.settings.guidance_interval)
        streams = self.streams if guidance != 1.0 else self.streams[:1]
        return LatentSampler(self.head, sampling).draw(streams, self.noise, guidance) * self.head.config.latent_scale

    def reference(self, guidance: float) -> Tensor:
        """As many DDIM evaluations as asked for, kept in a file."""
        path = Path(self.settings.output) / f"reference-{guidance:g}.pt"
        if not path.exists():
            torch.save(self.draw(guidance, "ddim", "trailing", self.settings.reference_steps), path)
        return torch.load(path, weights_only=True)

    def point(self, guidance: float, solver: str, spacing: str, num_steps: int) -> Point:
        """RMS error, and the 95th percentile of the RMS errors of single latents; without these for what cannot be drawn."""
        options = {"guidance": guidance, "solver": solver, "spacing": spacing, "num_diffusion_steps": num_steps}
        try:
            drawn = self.draw(guidance, solver, spacing, num_steps)
        except ValueError as error:  # more evaluations than the spacing has training steps
            return {**options, "refused": str(error)}
        squares = (drawn - self.reference(guidance)).double().square().mean(-1)
        tail = torch.quantile(squares.sqrt(), 0.95)
        return {**options, "rms": squares.mean().sqrt().item(), "p95": tail.item()}


def measure_errors(model: Any, processor: Any, settings: Settings) -> list[Point]:
    """All points of the error."""
    errors = Errors(model, processor, settings)
    wanted = {
        f"error/{solver}/{spacing}/{num_steps}/guidance {guidance:g}": (
            lambda guidance=guidance, solver=solver, spacing=spacing, num_steps=num_steps: errors.point(
                guidance, solver, spacing, num_steps
            )
        )
        for guidance in settings.error_guidance
        for solver in SOLVERS
        for spacing in SPACINGS
        for num_steps in settings.error_steps
    }
    return list(measured(Path(settings.output) / "points.jsonl", wanted, "error").values())


def error_of(errors: Iterable[Point], settings: Settings, solver: str, spacing: str, num_steps: int) -> float:
    """RMS error at the guidance of use; infinite for what was refused or not measured."""
    wanted = {"guidance": settings.guidance, "solver": solver, "spacing": spacing, "num_diffusion_steps": num_steps}
    found = (point for point in errors if all(point[name] == value for name, value in wanted.items()))
    return next((point.get("rms", float("inf")) for point in found), float("inf"))


def score_options(model: Any, settings: Settings, errors: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Name -> group and options of all points of the score. Groups: steps, guidance, annealing."""
    own = model.diffusion_head.resolve(Sampling())
    exact = {"solver": "ddim", "spacing": "trailing", "num_diffusion_steps": settings.exact_steps}
    found: dict[str, dict[str, Any]] = {"exact": {"group": "steps", **exact}}
    for solver in SOLVERS:
        for num in settings.score_steps:
            spacing = min(SPACINGS, key=lambda name: error_of(errors, settings, solver, name, num))
            options = {"solver": solver, "spacing": spacing, "num_diffusion_steps": num}
            found[f"{solver}-{spacing}-{num}"] = {"group": "steps", **options}
    same = {"solver": own.solver, "spacing": own.spacing, "num_diffusion_steps": own.num_diffusion_steps}
    for guidance in sorted({settings.guidance, *settings.score_guidance}):
        found[f"own-guidance-{guidance:g}"] = {"group": "guidance", **same, "guidance": guidance}
    for schedule in ("linear", "cosine"):
        for last in settings.last_steps:
            annealed = {**same, "step_schedule": schedule, "last_diffusion_steps": last}
            found[f"own-{schedule}-{last}"] = {"group": "annealing", **annealed}
    return found


def score(model: Any, processor: Any, settings: Settings, name: str, options: dict[str, Any]) -> Point:
    """SmallGenEval of one sampler."""
    task = settings.score_task
    run = scored(settings, {key: value for key, value in options.items() if key != "group"}, name)
    start = time.monotonic()
    small_world.draw_captions(model, processor, small_geneval_items(run.num_per_task, run.held_out), run, task)
    seconds = time.monotonic() - start
    report = report_geneval(Path(run.output) / task)
    sampler = LatentSampler(model.diffusion_head, Sampling(**small_world.sampler_options(run)))
    num_latents = model.config.num_latents
    mean = sum(sampler.num_steps_at(place, num_latents) for place in range(num_latents)) / num_latents
    grades = read_results(Path(run.output) / task / "results.jsonl")
    right = {tag: "".join("01"[grade["correct"]] for grade in grades if grade["tag"] == tag) for tag in _tags(grades)}
    same = {"guidance": run.guidance, **options, "mean_evaluations": mean}
    return {**same, "score": report["overall"], "seconds": round(seconds, 1), "right": right}


def _tags(grades: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(grade["tag"] for grade in grades))


def measure_scores(model: Any, processor: Any, settings: Settings, errors: Sequence[Point]) -> list[Point]:
    """All points of the score, each with its difference to the exact one on the same prompts and noise."""
    wanted = {
        f"score/{name}": lambda name=name, options=options: score(model, processor, settings, name, options)
        for name, options in score_options(model, settings, errors).items()
    }
    points = measured(Path(settings.output) / "points.jsonl", wanted, "score")
    exact = _tasks(points["score/exact"])
    return [{**point, "difference": paired_bootstrap(_tasks(point), exact).interval.as_dict()} for point in points.values()]


def _tasks(point: Point) -> dict[str, Task]:
    return {tag: Task([float(digit) for digit in digits]) for tag, digits in point["right"].items()}


# ------------------------------------------------------------------ results


def neutral(settings: Settings, errors: Sequence[Point], scores: Sequence[Point]) -> list[Point]:
    """Samplers without annealing whose score is not below the interval of the exact one and whose error, at the guidance of
    use, is no larger than its; cheapest first."""
    limit = error_of(errors, settings, "ddim", "trailing", settings.exact_steps)
    low = next(point["score"]["low"] for point in scores if point["key"] == "score/exact")
    found = []
    for point in scores:
        num = point["num_diffusion_steps"]
        error = error_of(errors, settings, point["solver"], point["spacing"], num)
        if point["group"] == "steps" and point["score"]["value"] >= low and error <= limit:
            found.append({**{name: point[name] for name in ("solver", "spacing", "num_diffusion_steps", "score")}, "rms": error})
    return sorted(found, key=lambda point: point["num_diffusion_steps"])


def table(settings: Settings, errors: Sequence[Point]) -> str:
    """RMS error by guidance, sampler and number of evaluations."""
    lines = []
    for guidance in settings.error_guidance:
        lines.append(f"guidance {guidance:<11g}" + "".join(f"{num:>8d}" for num in settings.error_steps))
        for solver in SOLVERS:
            for spacing in SPACINGS:
                row = {p["num_diffusion_steps"]: p.get("rms") for p in errors
                       if (p["guidance"], p["solver"], p["spacing"]) == (guidance, solver, spacing)}  # fmt: skip
                cells = [row.get(num) for num in settings.error_steps]
                shown = "".join(f"{'-' if cell is None else format(cell, '.4f'):>8s}" for cell in cells)
                lines.append(f"{solver + ' ' + spacing:20s}" + shown)
    return "\n".join(lines)


def report(settings: Settings, errors: Sequence[Point], scores: Sequence[Point]) -> dict[str, Any]:
    """Print what was found; the part of the results that follows from it."""
    print(table(settings, errors))
    for point in scores:
        cell, difference = point["score"], point["difference"]
        interval = f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
        paired = f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        print(f"{point['key']:32s} {point['mean_evaluations']:6.1f} evaluations  {interval}  to exact {paired}")
    if not errors or not scores:
        return {}
    found = neutral(settings, errors, scores)
    names = [f"{point['solver']} {point['spacing']} {point['num_diffusion_steps']}" for point in found]
    print(f"neutral: {', '.join(names) or 'none'}; the cheapest: {names[0] if names else 'none'}")
    return {"neutral": found, "cheapest_neutral": found[0] if found else None}


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, measure what is missing, write and print."""
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    folder = Path(settings.output)
    check_manifest(folder, settings, FREE)
    model = OrthusForConditionalGeneration.from_pretrained(settings.model).eval().to(torch.device(settings.device))
    processor = OrthusProcessor.from_pretrained(settings.model)
    own = model.diffusion_head.resolve(Sampling())
    errors = measure_errors(model, processor, settings) if "error" in settings.parts else []
    scores = measure_scores(model, processor, settings, errors) if "score" in settings.parts else []
    result = {**report(settings, errors, scores), "own": to_dict(own), "objective": model.diffusion_head.config.objective}
    result |= {"error": errors, "score": scores, **provenance(settings, "eval.solver_curves")}
    write_json(folder / small_world.RESULTS, result)
    write_figure(folder / "curves.png", errors, scores, settings.guidance, f"{result['objective']} ({settings.model})")


if __name__ == "__main__":
    main()
