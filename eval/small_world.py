"""The small-world benchmark of a model: generate, grade, report. The same command resumes.

`python -m eval.small_world model=checkpoints/orthus-small [output=runs/eval-small num_per_task=200 seed=0 guidance=2.0]`
writes answers and grades under `output`, and `results.json` there and beside the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from PIL import Image

from eval import floors
from eval.answers import Answer, Decoding, Request, ask
from eval.small_reports import (
    mme_records,
    report_descriptions,
    report_edits,
    report_geneval,
    report_mme,
    report_stories,
    write_lines,
)
from eval.small_tasks import describe_requests, edit_requests, geneval_requests, mme_requests, story_requests
from orthus.adapters import quantization
from orthus.data.world.benchmark import EditItem, MmeItem, StoryItem, edit_items, small_geneval_items, small_mme_items
from orthus.data.world.benchmark import story_items as make_story_items
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.scene import Scene, WorldConfig
from orthus.data.world.splits import fingerprint
from orthus.sampling import Sampling
from orthus.training.settings import differences, load_settings, to_dict

ANSWER_TOKENS = 128
STORY_TOKENS = 256
RESULTS = "results.json"
T = TypeVar("T")
TASKS = ("geneval", "geneval_direct", "mme", "describe", "edit", "story")


@dataclass(frozen=True)
class Settings:
    """What is evaluated and how it is decoded; see `python -m eval.small_world --help`.

    plan: captions and edits are answered freely, so that the model may say what it will draw before it draws; without, and in
        `small_geneval_direct`, begin-of-image is forced at once.
    tasks: what is asked: some of geneval, geneval_direct, mme (with a blank picture as well), describe, edit, story.
    num_per_task: GenEval-form prompts of each of the six tasks; half as many pictures of each question subtask;
        as many pictures to describe.
    guidance, edit_guidance, story_guidance: weight of the text; image_guidance: of the picture that is edited.
    text_guidance: weight of the prompt in what the model says before it draws for a caption.
    guidance_interval, ... guidance_rescale: how latents are drawn, as in `orthus.sampling.Sampling`; null: as the config says.
    mme_parser: official, lmms or strict.
    quantize: no, or the backbone's weights as int8 or int4: what that costs in quality (CPU speed is not what it is for).
    world: of the pictures that are shown, and of the scenes on which the grader is validated: `world.level=free`, ...
    """

    model: str
    output: str = "runs/eval-small"
    tasks: tuple[str, ...] = TASKS
    num_per_task: int = 200
    num_edits: int = 120
    num_stories: int = 80
    seed: int = 0
    plan: bool = True
    guidance: float = 2.0
    edit_guidance: float = 2.0
    image_guidance: float = 1.0
    story_guidance: float = 2.0
    text_guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 0.85)
    num_diffusion_steps: int | None = None
    solver: str | None = None
    spacing: str | None = None
    step_schedule: str = "constant"
    last_diffusion_steps: int | None = None
    guidance_schedule: str = "constant"
    guidance_rescale: float = 0.0
    batch_size: int = 64
    held_out: bool = True
    mme_parser: str = "official"
    device: str = "cpu"
    quantize: Literal["no", "int8", "int4"] = "no"
    world: WorldConfig = WorldConfig()

    def __post_init__(self) -> None:
        for name in ("num_per_task", "num_edits", "num_stories", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; give at least 1")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r} is unknown; use some of {', '.join(TASKS)}")
        if self.num_per_task % 4:
            raise ValueError(f"num_per_task={self.num_per_task}; give a multiple of 4 (question pictures come in twins)")
        Sampling(**sampler_options(self))


def sampler_options(settings: Settings) -> dict[str, Any]:
    """The fields of [`Sampling`] among the settings."""
    return {field.name: getattr(settings, field.name) for field in fields(Sampling)}


@dataclass(frozen=True)
class Items:
    """All prompts of a run."""

    geneval: list[dict[str, Any]]
    mme: list[MmeItem]
    descriptions: list[tuple[Scene, str]]
    edits: list[EditItem]
    stories: list[StoryItem]


def make_items(settings: Settings) -> Items:
    """The held-out benchmark (fixed by its own seed, not the run's)."""
    world = settings.world
    dataset = WorldDataset("test", {"describe": 1.0}, world)
    drafts = [dataset.draft(index) for index in range(settings.num_per_task)]
    return Items(
        small_geneval_items(settings.num_per_task, settings.held_out),
        small_mme_items(settings.num_per_task // 2, config=world),
        [(draft.scenes()[0], str(draft.turns[-1][1][0])) for draft in drafts],
        edit_items(settings.num_edits, config=world),
        make_story_items(settings.num_stories, config=world),
    )


def decodings(settings: Settings) -> dict[str, Decoding]:
    """How each task is decoded; recorded with the results."""
    image = Decoding("image", settings.guidance, **sampler_options(settings), max_images=1)
    text = Decoding("text", max_new_tokens=ANSWER_TOKENS)
    story = replace(image, modality="interleaved", guidance=settings.story_guidance)
    edit = replace(image, guidance=settings.edit_guidance, image_guidance=settings.image_guidance)
    if (edit.guidance, edit.image_guidance) == (1.0, 1.0):
        edit = replace(edit, image_guidance=None)

    def planned(decoding: Decoding, text_guidance: float = 1.0) -> Decoding:
        if not settings.plan:
            return decoding
        return replace(decoding, modality="interleaved", force_image=True, text_guidance=text_guidance)

    return {
        "geneval": planned(image, settings.text_guidance),
        "geneval_direct": image,
        "mme": text,
        "mme_blank": text,
        "describe": text,
        "edit": planned(edit),
        "story": replace(story, max_new_tokens=STORY_TOKENS, max_images=6),
    }


def generate(model: Any, processor: Any, items: Items, settings: Settings) -> dict[str, dict[str, Answer]]:
    """Ask everything of `settings.tasks` that is not answered yet; {} for the other tasks."""
    requests: dict[str, list[Request]] = {
        "geneval": geneval_requests(items.geneval),
        "geneval_direct": geneval_requests(items.geneval),
        "mme": mme_requests(items.mme),
        "mme_blank": mme_requests(items.mme, blank=True),
        "describe": describe_requests([scene for scene, _ in items.descriptions]),
        "edit": edit_requests(items.edits),
        "story": story_requests(items.stories),
    }
    how, folder = decodings(settings), Path(settings.output)
    return {
        task: ask(model, processor, task, asked, how[task], folder, settings.seed, settings.batch_size)
        for task, asked in requests.items()
        if task.removesuffix("_blank") in settings.tasks
    }


def round_trip(model: Any, processor: Any, batch_size: int = 64) -> floors.RoundTrip:
    """Pictures through the model's autoencoder: what the grader sees at best."""

    def through(images: Sequence[Image.Image]) -> list[Image.Image]:
        restored: list[Image.Image] = []
        for start in range(0, len(images), batch_size):
            pixel_values = processor.image_processor.pixel_values(images[start : start + batch_size])
            latents = model.get_image_latents(pixel_values.to(model.device))
            restored += processor.image_processor.postprocess(model.decode_image_latents(latents))
        return restored

    return through


def evaluate(model: Any, processor: Any, settings: Settings) -> dict[str, Any]:
    """All stages; answers that exist are not generated again."""
    folder, seconds = Path(settings.output), {}

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        start = time.monotonic()
        value = stage()
        seconds[name] = round(time.monotonic() - start, 1)
        return value

    items = make_items(settings)
    answers = timed("generate", lambda: generate(model, processor, items, settings))
    reports: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "geneval": ("small_geneval", lambda: report_geneval(items.geneval, answers["geneval"], folder)),
        "geneval_direct": (
            "small_geneval_direct",
            lambda: report_geneval(items.geneval, answers["geneval_direct"], folder, "geneval_direct"),
        ),
        "mme": ("small_mme", lambda: report_mme(items.mme, answers["mme"], settings.mme_parser)),
        "describe": ("describing", lambda: report_descriptions(items.descriptions, answers["describe"], folder)),
        "edit": ("editing", lambda: report_edits(items.edits, answers["edit"], folder)),
        "story": ("interleaved", lambda: report_stories(items.stories, answers["story"], folder)),
    }
    result: dict[str, Any] = {reports[task][0]: timed(f"grade_{task}", reports[task][1]) for task in settings.tasks}
    checked = items.geneval[:: max(1, len(items.geneval) // 600)]
    result["grader"] = timed(
        "validate", lambda: floors.validate_grader(checked, round_trip(model, processor), config=settings.world)
    )
    result["floors"] = {"small_geneval": floors.geneval_floors(items.geneval, config=settings.world)}
    if "mme" in settings.tasks:
        write_lines(folder / "grades-mme.jsonl", [asdict(record) for record in mme_records(items.mme, answers["mme"])])
        blank = report_mme(items.mme, answers["mme_blank"], settings.mme_parser)
        shown = [name for name, cell in blank.items() if "value" in cell]
        result["floors"]["small_mme"] = floors.mme_floors(items.mme, floors.majority_answers()) | {
            "model_with_blank_picture": {name: blank[name]["value"] for name in shown}
        }
    return {**result, "seconds": seconds, "decoding": {name: asdict(d) for name, d in decodings(settings).items()}}


def provenance(settings: Any, module: str = "eval.small_world") -> dict[str, Any]:
    """Where a result of `python -m module` comes from: command, commit, weights, held-out split, versions and hardware."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "seed": settings.seed,
        "settings": to_dict(settings),
        "weights_sha256": weights_hash(Path(settings.model)),
        "held_out_fingerprint": fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")}
        | {"python": platform.python_version()},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, device {settings.device}",
    }


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in name order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_manifest(folder: Path, settings: Any, free: Sequence[str] = ("output", "device", "mme_parser")) -> None:
    """Refuse to mix answers of other weights or settings in one folder; `free` may differ. Raises `ValueError` with what does."""
    kept = {name: value for name, value in to_dict(settings).items() if name not in free}
    manifest = {"settings": kept, "weights_sha256": weights_hash(Path(settings.model))}
    path = folder / "manifest.json"
    if path.exists():
        changed = differences(json.loads(path.read_text(encoding="utf-8")), manifest)
        if changed:
            raise ValueError(f"{folder} holds answers of another run ({'; '.join(changed)}); give another output=")
    write_json(path, manifest)


def is_standard(settings: Settings) -> bool:
    """Whether the run is the one whose results lie beside a model: default settings on whatever machine."""
    free: dict[str, Any] = {"model": "", "output": "", "device": "", "batch_size": 1}
    return replace(settings, **free) == replace(Settings(""), **free)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def from_command_line(cls: Callable[..., T], argv: Sequence[str] | None, description: str | None) -> T | None:
    """The settings of `key=value` arguments; None where help was asked for, which is printed then."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"{description}\n{cls.__doc__}\n" + "\n".join(f"  {k}: {v}" for k, v in to_dict(cls("")).items()))
        return None
    return load_settings(cast("type[T]", cls), os.devnull, arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, evaluate it, write the results and print the main numbers."""
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    from orthus.modeling import OrthusForConditionalGeneration
    from orthus.processing import OrthusProcessor

    check_manifest(Path(settings.output), settings)
    model = OrthusForConditionalGeneration.from_pretrained(settings.model, quantization_config=quantization(settings.quantize))
    model = model.eval().to(torch.device(settings.device))
    processor = OrthusProcessor.from_pretrained(settings.model)
    result = {**evaluate(model, processor, settings), **provenance(settings)}
    write_json(Path(settings.output) / RESULTS, result)
    if is_standard(settings):
        write_json(Path(settings.model) / RESULTS, result)
    else:
        print(f"not the standard settings: results are in {settings.output} only, those beside the model stay as they are")
    for name, section in result.items():
        best = section.get("overall") if isinstance(section, dict) else None
        if not isinstance(best, dict) or "low" not in best:
            continue
        print(f"{name}: {best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}], n = {best['n']}")


if __name__ == "__main__":
    main()
