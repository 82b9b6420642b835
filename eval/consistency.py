"""Does a model see what it draws? It answers questions about pictures of its own.

    python -m eval.consistency model=checkpoints/orthus-small output=runs/consistency [num_per_task=20]

SmallGenEval's prompts are drawn (eval.geneval), the small world's grader says what is in each picture, and the model is asked

- in MME's form (one yes, one no; existence, count, position, color) about what the grader sees: accuracy;
- about each thing that the prompt asked for, which the drawing model meant to be there: agreement with the prompt, and whether
  the model calls its picture right (yes to all of these) beside whether the grader does: a 2 x 2 table with Cohen's kappa.

Pictures in which the grader sees nothing, or something that it does not know, are left out of the first part and counted.
In `output`: the drawings, answers in `asked/` and `prompted/`, consistency.json, report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.answers import Answer, Decoding, StoredPicture, item_seed
from eval.exits import exit_code
from eval.geneval import generate as drawing
from eval.geneval.verdict import TAGS
from eval.grader import as_judged, detect
from eval.loading import ModelSettings, load
from eval.mme import generate as asking
from eval.mme.grading import PARSERS, find_parser, grade_pairs, image_scores, pair_by_image, score_pairs
from eval.mme.items import Item
from eval.page import Sample, Table, first_of_each, page
from eval.provenance import from_command_line, provenance
from eval.small_tasks import as_object, judge_caption, pixels
from eval.statistics import NUM_RESAMPLES, Task, bootstrap, interval_text
from eval.whole_files import write_json, write_text
from orthus.data.world.questions import (
    SUBTASKS,
    Question,
    color_question,
    count_question,
    existence_question,
    position_question,
)
from orthus.data.world.sampling import pick
from orthus.data.world.scene import COLORS, MIRROR, RELATIONS, SHAPES, SceneObject, has_margin
from orthus.training.distributed import joined, rank

MOST = 4
"""Objects of a class that a question asks for: as many as the model was taught to count in questions."""
CELLS = {
    (True, True): "drawn right, called right",
    (True, False): "drawn right, called wrong",
    (False, True): "drawn wrong, called right",
    (False, False): "drawn wrong, called wrong",
}


@dataclass(frozen=True)
class Settings:
    """What is drawn and asked, and how.

    num_per_task, held_out, num_samples: of SmallGenEval's prompts, and pictures of each.
    drawing: words and then a picture, as in eval.small_world; answering, answer_after, parser: as in eval.mme.
    """

    model: str
    output: str
    num_per_task: int = 20
    num_samples: int = 1
    held_out: bool = True
    seed: int = 0
    batch_size: int = 64
    drawing: Decoding = Decoding(
        "interleaved", guidance=2.0, text_guidance=3.0, guidance_interval=(0.0, 0.85), max_images=1, force_image=True
    )
    answering: Decoding = Decoding("text", max_new_tokens=128)
    answer_after: str | None = "Answer:"
    parser: str = "official"
    loading: ModelSettings = ModelSettings()

    def __post_init__(self) -> None:
        if self.parser not in PARSERS:
            raise ValueError(f"parser={self.parser} is unknown; use one of {', '.join(PARSERS)}")
        drawing_settings(self)

    @property
    def device(self) -> str:
        return self.loading.device


def drawing_settings(settings: Settings) -> drawing.Settings:
    """Raises `ValueError` for numbers below 1 and a decoding without a picture."""
    names = ("model", "output", "num_samples", "num_per_task", "held_out", "seed", "batch_size", "loading")
    kept = {name: getattr(settings, name) for name in names}
    return drawing.Settings(**kept, prompts="small", decoding=settings.drawing, detector="world")


@dataclass(frozen=True)
class Drawn:
    """A picture of the model, its prompt in GenEval's form, and what the grader sees: `objects` is None where it is unsure."""

    key: str
    prompt: Mapping[str, Any]
    stored: StoredPicture
    objects: tuple[SceneObject, ...] | None
    is_right: bool
    reason: str


def look(items: Sequence[Mapping[str, Any]], answers: Mapping[str, Answer]) -> list[Drawn]:
    """What the small world's grader sees in each drawing."""
    drawn = []
    for key, answer in answers.items():
        prompt, stored = items[int(key.split("/")[0])], answer.stored[0]
        found = detect(pixels(stored.open()))
        judged = judge_caption(as_judged(found), prompt)
        objects = tuple(map(as_object, found)) if all(one.is_known for one in found) else None
        drawn.append(Drawn(key, prompt, stored, objects, judged.correct, judged.reason))
    return drawn


def opposite_questions(rng: np.random.Generator, objects: Sequence[SceneObject]) -> dict[str, tuple[Question, Question]]:
    """For each of SUBTASKS that the objects allow, a question with the answer yes and one with no, in this order."""
    shapes = [item.shape for item in objects]
    if not shapes:
        return {}
    singles = [item for item in objects if shapes.count(item.shape) == 1]
    there, absent = pick(rng, shapes), pick(rng, [shape for shape in SHAPES if shape not in shapes])
    found = {"existence": (existence_question(there, absent, True), existence_question(absent, there, False))}
    counted = pick(rng, shapes)
    count = shapes.count(counted)
    if count <= MOST:
        others = [number for number in (count - 1, count + 1) if 1 <= number <= MOST]
        found["count"] = (count_question(counted, count, True), count_question(counted, pick(rng, others), False))
    pairs = [(a, b, r) for a in singles for b in singles for r in RELATIONS if a is not b and has_margin(a, b, r)]
    if pairs:
        a, b, relation = pick(rng, pairs)
        words = (a.shape, relation, b.shape), (a.shape, MIRROR[relation], b.shape)
        found["position"] = (position_question(*words[0], True), position_question(*words[1], False))
    if singles:
        item = pick(rng, singles)
        seen = sorted({other.color for other in objects} - {item.color})
        wrong, short = pick(rng, seen or [color for color in COLORS if color != item.color]), bool(rng.random() < 0.7)
        found["color"] = (color_question(item.shape, item.color, True, short), color_question(item.shape, wrong, False, short))
    return {subtask: found[subtask] for subtask in SUBTASKS if subtask in found}


def grader_items(drawn: Sequence[Drawn], seed: int) -> list[Item]:
    """MME-form questions about what the grader sees, the yes and the no question of a picture in random order."""
    items = []
    for picture in drawn:
        rng = np.random.default_rng(item_seed(seed, "consistency", picture.key))
        for subtask, questions in opposite_questions(rng, picture.objects or ()).items():
            ordered = questions if rng.random() < 0.5 else questions[::-1]
            items += [Item(subtask, picture.key, q.text, q.answer, picture.stored.open) for q in ordered]
    return sorted(items, key=lambda item: SUBTASKS.index(item.subtask))


def prompt_questions(prompt: Mapping[str, Any]) -> list[Question]:
    """Questions to which what the prompt asks for answers yes."""
    questions, clauses = [], prompt["include"]
    for clause in clauses:
        shape = clause["class"]
        if clause["count"] > 1:
            questions.append(count_question(shape, clause["count"], True))
        elif "color" in clause:
            questions.append(color_question(shape, clause["color"], True, short=False))
        else:
            questions.append(existence_question(shape, shape, True))
        if "position" in clause:
            relation, anchor = clause["position"]
            questions.append(position_question(shape, relation, clauses[anchor]["class"], True))
    return questions


def prompt_items(drawn: Sequence[Drawn]) -> list[Item]:
    """The questions of each drawing's prompt, one Item each."""
    return [
        Item(question.kind, f"{picture.key}/{number}", question.text, question.answer, picture.stored.open)
        for picture in drawn
        for number, question in enumerate(prompt_questions(picture.prompt))
    ]


def kappa(table: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Cohen's kappa of 2 x 2 counts `(..., 4)` in the order of CELLS; 0 where chance alone agrees in everything."""
    counts = np.asarray(table, float)
    both, first, second, neither = np.moveaxis(counts / counts.sum(-1, keepdims=True), -1, 0)
    chance = (both + first) * (both + second) + (second + neither) * (first + neither)
    observed = both + neither
    return np.asarray(np.where(chance < 1, (observed - chance) / np.where(chance < 1, 1 - chance, 1), 0.0))


def kappa_interval(cells: Sequence[tuple[bool, bool]], clusters: Sequence[str], seed: int = 0) -> dict[str, float | int]:
    """Kappa with its 95 % percentile interval over clusters."""
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    counts = np.zeros((len(names), 4))
    for cell, cluster in zip(cells, clusters, strict=True):
        counts[names[cluster], list(CELLS).index(cell)] += 1
    rng = np.random.default_rng(seed)
    drawn = [counts[rng.integers(len(counts), size=len(counts))].sum(0) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(kappa(drawn), (0.025, 0.975))
    return {"value": float(kappa(counts.sum(0))), "low": float(low), "high": float(high), "n": len(cells)}


@dataclass(frozen=True)
class Told:
    """What the model says: by drawing, whether its two answers on each subtask are right, and to each prompt question."""

    asked: Mapping[str, Mapping[str, tuple[bool, bool]]]
    prompted: Mapping[str, list[tuple[str, str]]]

    def calls_right(self, key: str) -> bool:
        return all(answer == "yes" for _, answer in self.prompted[key])


def ask(model: Any, processor: Any, drawn: Sequence[Drawn], settings: Settings) -> tuple[Told, dict[str, Any]]:
    """Both sets of questions, through eval.mme; also MME's numbers by subtask. Every process calls this."""
    folder = Path(settings.output)
    names = ("model", "seed", "batch_size", "answer_after", "parser", "loading")
    how = asking.Settings(
        **{name: getattr(settings, name) for name in names}, output=str(folder / "asked"), decoding=settings.answering
    )
    asked, scores = {}, {}
    for subtask, records in asking.answer(model, processor, grader_items(drawn, settings.seed), how).items():
        pairs = pair_by_image(records)
        rights = grade_pairs(pairs, settings.parser)
        asked[subtask] = {pair[0].image_id: right for pair, right in zip(pairs, rights, strict=True)}
        whole = score_pairs(pairs, settings.parser)
        scores[subtask] = {
            "score": bootstrap(Task(image_scores(rights), maximum=200.0)).as_dict(),
            "acc_plus": whole.acc_plus,
            "other": whole.other_rate,
        }
    parse = find_parser(settings.parser)
    prompted: dict[str, list[tuple[str, str]]] = {picture.key: [] for picture in drawn}
    found = asking.answer(model, processor, prompt_items(drawn), replace(how, output=str(folder / "prompted")))
    for record in (record for records in found.values() for record in records):
        prompted[record.image_id.rpartition("/")[0]].append((record.question, parse(record.answer)))
    return Told(asked, prompted), scores


def result_of(drawn: Sequence[Drawn], told: Told, scores: Mapping[str, Any]) -> dict[str, Any]:
    """consistency.json: intervals over prompts."""
    prompt_of = {picture.key: str(picture.prompt["prompt"]) for picture in drawn}
    is_right = {picture.key: picture.is_right for picture in drawn}

    def accuracy(kept: Sequence[bool]) -> dict[str, Any] | None:
        rows = [
            (sum(pair) / 2, prompt_of[key])
            for group in told.asked.values()
            for key, pair in group.items()
            if is_right[key] in kept
        ]
        return bootstrap(Task([value for value, _ in rows], [name for _, name in rows])).as_dict() if rows else None

    cells = [(picture.is_right, told.calls_right(picture.key)) for picture in drawn]
    agreed = [(answer == "yes", prompt_of[key]) for key, said in told.prompted.items() for _, answer in said]
    clusters = [prompt_of[picture.key] for picture in drawn]
    return {
        "num_pictures": len(drawn),
        "left_out": {
            "unknown": sum(picture.objects is None for picture in drawn),
            "empty": sum(picture.objects == () for picture in drawn),
        },
        "drawn_right": bootstrap(Task([float(right) for right, _ in cells], clusters)).as_dict(),
        "called_right": bootstrap(Task([float(called) for _, called in cells], clusters)).as_dict(),
        "accuracy": {"all": accuracy((True, False)), "drawn_right": accuracy((True,)), "drawn_wrong": accuracy((False,))},
        "subtasks": {
            name: {
                "acc": bootstrap(Task([sum(pair) / 2 for pair in group.values()], [prompt_of[key] for key in group])).as_dict(),
                **scores[name],
            }
            for name, group in told.asked.items()
        },
        "agreement_with_prompt": bootstrap(Task([float(yes) for yes, _ in agreed], [name for _, name in agreed])).as_dict(),
        "table": {name: cells.count(cell) for cell, name in CELLS.items()},
        "agreement": bootstrap(Task([float(right == called) for right, called in cells], clusters)).as_dict(),
        "kappa": kappa_interval(cells, clusters),
        "by_tag": {
            tag: {
                name: sum(c == cell for c, d in zip(cells, drawn, strict=True) if d.prompt["tag"] == tag)
                for cell, name in CELLS.items()
            }
            for tag in TAGS
        },
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    rows = [["subtask", "accuracy [95 %, over prompts]", "acc+", "MME score [over pictures]", "neither", "questions"]]
    for name, part in result["subtasks"].items():
        cells = interval_text(part["acc"]), f"{part['acc_plus']:.3f}", interval_text(part["score"]), f"{part['other']:.3f}"
        rows.append([name, *cells, str(2 * part["acc"]["n"])])
    rows += [
        [name.replace("_", " "), interval_text(cell), "", "", "", str(2 * cell["n"])]
        for name, cell in result["accuracy"].items()
        if cell
    ]
    left = result["left_out"]
    note = (
        f"{result['num_pictures']} drawings; not asked about: {left['unknown']} in which the grader does not know something, "
        f"{left['empty']} in which it sees nothing."
    )
    whole = [["", "share [95 %, over prompts]"]]
    for name in ("drawn_right", "called_right", "agreement_with_prompt", "agreement", "kappa"):
        whole.append([name.replace("_", " "), interval_text(result[name])])
    crossed = [["task", *CELLS.values()], ["all", *map(str, result["table"].values())]]
    crossed += [[tag.replace("_", " "), *map(str, counts.values())] for tag, counts in result["by_tag"].items()]
    return [
        Table("Answers about its own drawings, against the grader", rows, note),
        Table("Drawings by the grader and by the model", crossed, "Called right: yes to all that the prompt asks for."),
        Table("Agreement", whole, "With the prompt: share of its parts that the model sees; kappa: of the table above."),
    ]


def samples(drawn: Sequence[Drawn], told: Told, per_kind: int = 8) -> list[Sample]:
    """Drawings with what the model says of them."""
    made = []
    for picture in drawn:
        said = tuple(
            f"{question.removesuffix(' Please answer yes or no.')} {answer}" for question, answer in told.prompted[picture.key]
        )
        mistakes = [name for name, group in told.asked.items() if not all(group.get(picture.key, (True, True)))]
        reason = "\n".join([*picture.reason.splitlines(), *(f"wrong answer about {name}" for name in mistakes)])
        verdict = CELLS[(picture.is_right, told.calls_right(picture.key))]
        shown = (picture.stored.path, "; ".join(said))
        made.append(Sample(picture.prompt["tag"].replace("_", " "), picture.prompt["prompt"], verdict, shown, reason))
    return first_of_each(made, per_kind)


def main(argv: Sequence[str] | None = None) -> None:
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    with joined(settings.device):
        model, processor = load(settings.model, settings.loading)
        name, items = drawing.prompt_set("small", settings.num_per_task, settings.held_out)
        drawn = look(items, drawing.draw(model, processor, name, items, drawing_settings(settings)))
        told, scores = ask(model, processor, drawn, settings)
        if rank() > 0:
            return
        result = {**result_of(drawn, told, scores), **provenance(settings, "eval.consistency")}
        folder, shown = Path(settings.output), tables(result)
        write_json(folder / "consistency.json", result)
        text = page("Answers about its own drawings", [result["command"]], shown, [], samples(drawn, told))
        write_text(folder / "report.html", text)
        for table in shown:
            print(f"{table.title}. {table.note}")
            print("\n".join("  ".join(f"{cell:<28}" for cell in row) for row in table.rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
