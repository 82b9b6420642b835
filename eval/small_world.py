"""The small-world benchmark of a model: generate, grade, report. The same command resumes.

`python -m eval.small_world model=checkpoints/orthus-small [output=runs/eval-small num_per_task=200 seed=0 guidance=2.0]`
writes answers and grades under `output`, and `results.json` there and beside the model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from eval import floors
from eval.answers import Answer, Decoding, Request, ask
from eval.exits import exit_code
from eval.geneval import generate as geneval
from eval.loading import ModelSettings, load, require_model
from eval.mme import generate as mme
from eval.mme.items import in_mme_form
from eval.provenance import check_manifest, from_command_line, provenance
from eval.small_reports import (
    grade_captions,
    report_descriptions,
    report_edits,
    report_geneval,
    report_mme,
    report_stories,
)
from eval.small_tasks import describe_requests, edit_requests, story_requests
from eval.whole_files import write_json
from orthus.data.world.benchmark import EditItem, MmeItem, StoryItem, edit_items, small_geneval_items, small_mme_items
from orthus.data.world.benchmark import story_items as make_story_items
from orthus.data.world.dataset import WorldDataset
from orthus.data.world.language import ANSWER_MARK
from orthus.data.world.scene import Scene, WorldConfig
from orthus.sampling import Sampling
from orthus.training.distributed import barrier, joined, rank

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


def captions_run(settings: Settings, task: str) -> geneval.Settings:
    """The run of `eval.geneval` behind `geneval` or `geneval_direct`."""
    how, folder = decodings(settings)[task], f"{settings.output}/{task}"
    options: dict[str, Any] = {"seed": settings.seed, "batch_size": settings.batch_size, "loading": loading(settings)}
    return geneval.Settings(settings.model, folder, "small", 1, settings.num_per_task, settings.held_out, decoding=how, **options)


def questions_run(settings: Settings, task: str) -> mme.Settings:
    """The run of `eval.mme` behind `mme` or `mme_blank`."""
    same: dict[str, Any] = {"seed": settings.seed, "batch_size": settings.batch_size, "loading": loading(settings)}
    same |= {"decoding": decodings(settings)[task], "answer_after": ANSWER_MARK.strip(), "parser": settings.mme_parser}
    folder, num_images = f"{settings.output}/{task}", settings.num_per_task // 2
    return mme.Settings(settings.model, folder, num_images=num_images, blank=task == "mme_blank", **same)


def loading(settings: Settings) -> ModelSettings:
    return ModelSettings(settings.device, quantize=settings.quantize)


def draw_captions(model: Any, processor: Any, items: Sequence[dict[str, Any]], settings: Settings, task: str) -> None:
    """Pictures of `geneval` or `geneval_direct`, and their grades."""
    run = captions_run(settings, task)
    name, _ = geneval.prompt_set(run.prompts, run.num_per_task, run.held_out)
    geneval.draw(model, processor, name, items, run, task)
    grade_captions(Path(run.output))
    barrier()


def generate(model: Any, processor: Any, items: Items, settings: Settings) -> dict[str, dict[str, Answer]]:
    """Ask everything of `settings.tasks` that is not answered yet; the answers of tasks that `eval` has no other command for."""
    for task in ("geneval", "geneval_direct"):
        if task in settings.tasks:
            draw_captions(model, processor, items.geneval, settings, task)
    for task in ("mme", "mme_blank"):
        if "mme" in settings.tasks:
            mme.answer(model, processor, in_mme_form(items.mme), questions_run(settings, task), task)
    requests: dict[str, list[Request]] = {
        "describe": describe_requests([scene for scene, _ in items.descriptions]),
        "edit": edit_requests(items.edits),
        "story": story_requests(items.stories),
    }
    how, folder = decodings(settings), Path(settings.output)
    return {
        task: ask(model, processor, task, asked, how[task], folder, settings.seed, settings.batch_size)
        for task, asked in requests.items()
        if task in settings.tasks
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
    """All stages; answers that exist are not generated again. Every process calls this; the first one gets the result."""
    folder, seconds = Path(settings.output), {}

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        start = time.monotonic()
        value = stage()
        seconds[name] = round(time.monotonic() - start, 1)
        return value

    items = make_items(settings)
    answers = timed("generate", lambda: generate(model, processor, items, settings))
    if rank() > 0:
        return {}
    reports: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "geneval": ("small_geneval", lambda: report_geneval(folder / "geneval")),
        "geneval_direct": ("small_geneval_direct", lambda: report_geneval(folder / "geneval_direct")),
        "mme": ("small_mme", lambda: report_mme(items.mme, folder / "mme", settings.mme_parser)),
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
        blank = report_mme(items.mme, folder / "mme_blank", settings.mme_parser)
        shown = [name for name, cell in blank.items() if "value" in cell]
        result["floors"]["small_mme"] = floors.mme_floors(items.mme, floors.majority_answers()) | {
            "model_with_blank_picture": {name: blank[name]["value"] for name in shown}
        }
    return {**result, "seconds": seconds, "decoding": {name: asdict(d) for name, d in decodings(settings).items()}}


def is_standard(settings: Settings) -> bool:
    """Whether the run is the one whose results lie beside a model: default settings on whatever machine."""
    free: dict[str, Any] = {"model": "", "output": "", "device": "", "batch_size": 1}
    return replace(settings, **free) == replace(Settings(""), **free)


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, evaluate it, write the results and print the main numbers."""
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    with joined(settings.device):
        require_model(settings.model)
        check_manifest(Path(settings.output), settings)
        result = evaluate(*load(settings.model, loading(settings)), settings)
    if not result:
        return
    result |= provenance(settings)
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
    sys.exit(exit_code(main))
