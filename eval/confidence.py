"""How far a model's confidence in its answers can be trusted: yes/no questions in MME's form, or multiple choice.

    python -m eval.confidence model=checkpoints/orthus-small output=runs/confidence [data=MME | data=FILE.jsonl]

The answer is generated first; then the probability of each possible answer is read where the answer stands (eval.choices), and
the confidence is that of the answer given, of all possible ones. Everything is done again with a blank picture: a calibrated
model is not surer of such an answer than it is right. In `output`: confidences.jsonl (for `python -m eval.calibration`),
calibration.json, report.html, and the blank run in `blank/`. ECE rises with few answers, in resamples more so, so that its
interval lies high. The measures are those of "Unveiling Uncertainty" (arXiv 2412.14660: ECE, and an "I don't know" option) and of
selective prediction (coverage, accuracy of what is answered).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.answers import Request, ask, stored_answers
from eval.calibration import Bin, fit_temperature, measures, reliability_bins, reliability_diagram
from eval.choices import (
    OTHER,
    Choice,
    Question,
    log_probabilities,
    multiple_choice,
    read_choices,
    yes_no,
)
from eval.exits import exit_code
from eval.loading import load
from eval.mme import generate
from eval.mme.grading import find_parser
from eval.mme.items import blank
from eval.page import Figure, Sample, Table, first_of_each, page
from eval.provenance import from_command_line, keep_manifest, model_folder, model_hash, provenance
from eval.statistics import Task, bootstrap, interval_text
from eval.whole_files import write_json, write_lines, write_picture, write_text
from orthus.training.distributed import barrier, joined, rank
from orthus.training.settings import to_dict

CHOICE_TASK = "choice"
DONT_KNOW = " If you are not sure, answer: I don't know."
MEASURES = ("accuracy", "mean_confidence", "ece", "ace", "brier", "nll")
NEVER = -1e4
"""Log-probability of an option that a question does not have, where others have more."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings(generate.Settings):
    """As of eval.mme.generate, but for:

    data: also a .jsonl file of multiple-choice questions {"image", "question", "options", "answer"}.
    answer_after: where these words are said, the answer stands after them, else directly after the prompt.
    abstain: add an offer to answer "I don't know" to every question. num_resamples: of each interval.
    """

    answer_after: str | None = "Answer:"
    abstain: bool = False
    num_resamples: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blank:
            raise ValueError("blank=true: the blank picture is measured in every run, beside the true one; drop it")
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples={self.num_resamples}; give at least 1")


def has_abstained(text: str) -> bool:
    """Whether an answer says that it is not known."""
    plain = text.lower().replace("\u2019", "'")
    return any(words in plain for words in ("don't know", "do not know", "dont know"))


def words_before(text: str, after: str | None) -> str:
    """What was said up to and with the last `after`; "" where it does not occur."""
    return "" if after is None or after not in text else text[: text.rindex(after) + len(after)]


def ask_all(model: Any, processor: Any, settings: Settings, is_blank: bool) -> tuple[list[Question], list[str]]:
    """The questions and what the model says to each, kept in `settings.output`."""
    folder = Path(settings.output)
    offer = DONT_KNOW if settings.abstain else ""
    if settings.data.endswith(".jsonl"):
        questions = _choice_questions(read_choices(Path(settings.data)), offer, is_blank)
        keep_manifest(folder, _choice_manifest(questions, settings, is_blank))
        barrier()
        requests = [question.request for question in questions]
        answers = ask(model, processor, CHOICE_TASK, requests, settings.decoding, folder, settings.seed, settings.batch_size)
    else:
        asked = generate.Settings(**{name: getattr(settings, name) for name in generate.Settings.__dataclass_fields__})
        asked = replace(asked, blank=is_blank)
        items = [replace(item, question=item.question + offer) for item in generate.items_of(asked)]
        generate.answer(model, processor, items, asked)
        requests, parse = generate.requests_of(items, asked), find_parser(settings.parser)
        questions = [yes_no(item, request, parse) for item, request in zip(items, requests, strict=True)]
        answers = stored_answers(folder, generate.TASK, requests)
    return questions, [answers[request.key].text for request in requests]


def _choice_questions(stored: Sequence[Choice], offer: str, is_blank: bool) -> list[Question]:
    questions = []
    for choice in stored:
        load_picture = choice.item.picture
        shown = partial(blank, load_picture) if is_blank else load_picture
        request = Request(choice.item.picture_key, (shown, choice.item.question + offer))
        questions.append(multiple_choice(choice.item, request, choice.options, f"{choice.item.subtask}/{choice.picture}"))
    return questions


def _choice_manifest(questions: Sequence[Question], settings: Settings, is_blank: bool) -> dict[str, Any]:
    asked = json.dumps([[q.request.key, q.item.question, q.truth] for q in questions])
    return {
        "questions_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "num_questions": len(questions),
        "blank": is_blank,
        **{name: getattr(settings, name) for name in ("abstain", "seed", "batch_size")},
        "decoding": to_dict(settings.decoding),
        "loading": {name: getattr(settings.loading, name) for name in ("dtype", "quantize")},
        "model_sha256": model_hash(model_folder(settings.model)),
    }


def measure(model: Any, processor: Any, settings: Settings, is_blank: bool = False) -> tuple[list[Question], list[Record]]:
    """Questions and a record of each. Every process calls this and gets all.

    An answer that is none of the choices is wrong, as MME grades it, with the confidence of the most probable one.
    """
    questions, texts = ask_all(model, processor, settings, is_blank)
    before = [words_before(text, settings.answer_after) for text in texts]
    logs = log_probabilities(model, processor, questions, before, settings.batch_size)
    after = [generate.final_answer(text, settings.answer_after) for text in texts]
    return questions, [_record(*row) for row in zip(questions, after, logs, strict=True)]


def _record(question: Question, text: str, logs: Mapping[str, float]) -> Record:
    said = question.read(text)
    shares = softmax(logs)
    likeliest = max(shares, key=lambda name: shares[name])
    return {
        "confidence": shares[likeliest if said == OTHER else said],
        "correct": int(said == question.truth),
        "subtask": question.item.subtask,
        "image_id": question.item.image_id,
        "picture": question.picture,
        "key": question.request.key,
        "truth": question.truth,
        "said": said,
        "likeliest": likeliest,
        "abstained": has_abstained(text),
        "mass": float(np.exp(list(logs.values())).sum()),
        "log_probabilities": dict(logs),
    }


def softmax(logs: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    values = np.array(list(logs.values())) / temperature
    weights = np.exp(values - values.max())
    return dict(zip(logs, (weights / weights.sum()).tolist(), strict=True))


def cells(records: Sequence[Record], num_resamples: int, seed: int = 0) -> dict[str, Any]:
    """MEASURES with 95 % percentile intervals over pictures. Raises `ValueError` for no records."""
    confidence = np.array([record["confidence"] for record in records])
    correct = np.array([record["correct"] for record in records], float)

    def values(rows: Any) -> list[float]:
        found = measures(confidence[rows], correct[rows]) | {"mean_confidence": float(confidence[rows].mean())}
        return [found[name] for name in MEASURES]

    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        groups.setdefault(record["picture"], []).append(number)
    rows, rng = [np.array(group) for group in groups.values()], np.random.default_rng(seed)
    drawn = (rng.integers(len(rows), size=len(rows)) for _ in range(num_resamples))
    resampled = [values(np.concatenate([rows[k] for k in picked])) for picked in drawn]
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    whole = values(np.arange(len(records)))
    found = {
        name: {"value": whole[k], "low": float(low[k]), "high": float(high[k]), "n": len(records)}
        for k, name in enumerate(MEASURES)
    }
    return {**found, "num_pictures": len(rows)}


def auroc(records: Sequence[Record]) -> float | None:
    """How often a right answer is surer than a wrong one, ties half (0.5: confidence tells nothing); None without one of each."""
    right, wrong = (np.array([r["confidence"] for r in records if r["correct"] == flag]) for flag in (1, 0))
    if not len(right) or not len(wrong):
        return None
    above = right[:, None] - wrong
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def is_fitted(picture: str) -> bool:
    """The half of the pictures on which the temperature is fitted, whatever their order."""
    return hashlib.sha256(picture.encode()).digest()[0] % 2 == 0


def temperature_of(records: Sequence[Record], num_resamples: int) -> dict[str, Any]:
    """The temperature of one half of the pictures, and the measures of the other before and after; `why` where none is best."""
    fitted = [record for record in records if is_fitted(record["picture"])]
    rest = [record for record in records if not is_fitted(record["picture"])]
    if not fitted or not rest:
        return {"temperature": None, "why": f"{len(records)} answers about too few pictures to halve"}
    names = sorted({name for record in fitted for name in record["log_probabilities"]})
    logits = [[record["log_probabilities"].get(name, NEVER) for name in names] for record in fitted]
    try:
        temperature = fit_temperature(logits, [names.index(record["truth"]) for record in fitted])
    except ValueError as error:
        return {"temperature": None, "why": str(error)}
    scaled = [at_temperature(record, temperature) for record in rest]
    return {
        "temperature": temperature,
        "num_fitted": len(fitted),
        "before": cells(rest, num_resamples),
        "after": cells(scaled, num_resamples),
        "bins_after": _bins(scaled),
    }


def at_temperature(record: Record, temperature: float) -> Record:
    shares = softmax(record["log_probabilities"], temperature)
    return {**record, "confidence": shares[record["likeliest"] if record["said"] == OTHER else record["said"]]}


def _bins(records: Sequence[Record]) -> list[dict[str, float]]:
    bins = reliability_bins([r["confidence"] for r in records], [r["correct"] for r in records])
    return [vars(part) for part in bins]


def summary(records: Sequence[Record], settings: Settings) -> dict[str, Any]:
    """Calibration of the answered questions, overall and by subtask, and what the answers were.

    other: share that is none of the choices. likeliest: share of the rest that is also the most probable choice (1 for greedy
    answers of one spelling). auroc: whether right answers are surer than wrong ones. mass: mean probability of all choices
    together; where it is low, something else was likely there.
    """
    pictures = [record["picture"] for record in records]
    kept = [record for record in records if not (settings.abstain and record["abstained"])]
    named = [record for record in kept if record["said"] != OTHER]
    result: dict[str, Any] = {
        "num_questions": len(records),
        "other": 1 - len(named) / len(kept) if kept else None,
        "likeliest": float(np.mean([r["said"] == r["likeliest"] for r in named])) if named else None,
        "auroc": auroc(kept),
        "mass": float(np.mean([r["mass"] for r in records])),
        "overall": cells(kept, settings.num_resamples) if kept else None,
        "subtasks": {
            name: cells([r for r in kept if r["subtask"] == name], settings.num_resamples)
            for name in dict.fromkeys(record["subtask"] for record in kept)
        },
        "bins": _bins(kept) if kept else [],
    }
    if settings.abstain:
        answered = Task([float(not record["abstained"]) for record in records], pictures)
        result["coverage"] = bootstrap(answered).as_dict()
    return result


def result_of(records: Mapping[str, Sequence[Record]], settings: Settings) -> dict[str, Any]:
    """calibration.json of the records with the true pictures ("picture") and with blank ones ("blank")."""
    kept = [record for record in records["picture"] if not (settings.abstain and record["abstained"])]
    found: dict[str, Any] = {name: summary(group, settings) for name, group in records.items()}
    return {**found, "temperature_scaling": temperature_of(kept, settings.num_resamples)}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Calibration by subtask with the true and the blank pictures, and before and after temperature scaling."""
    shown = []
    for name, title in (("picture", "With the picture"), ("blank", "With a blank picture")):
        part = result[name]
        rows = [["subtask", "answers", *(measure.replace("_", " ") for measure in MEASURES)]]
        rows += [_row(subtask, cell) for subtask, cell in (("all", part["overall"]), *part["subtasks"].items()) if cell]
        names = {
            "other": "answers that are none of the choices",
            "likeliest": "others that are the likeliest choice",
            "mass": "probability of all choices together",
            "auroc": "AUROC of confidence",
        }
        notes = [f"{words} {part[key]:.3f}" for key, words in names.items() if part[key] is not None]
        if "coverage" in part:
            notes.append(f"coverage {interval_text(part['coverage'])} (the rest abstained and is not counted)")
        shown.append(Table(title, rows, "; ".join(notes) + ". Intervals over pictures."))
    scaling = result["temperature_scaling"]
    if scaling["temperature"] is None:
        return [*shown, Table("Temperature scaling", [["not fitted"], [scaling["why"]]])]
    rows = [["", "answers", *(measure.replace("_", " ") for measure in MEASURES)]]
    rows += [_row(name, scaling[name]) for name in ("before", "after")]
    note = f"T = {scaling['temperature']:.3f}, fitted on {scaling['num_fitted']} answers about other pictures."
    return [*shown, Table("Temperature scaling", rows, note)]


def _row(name: str, cell: Mapping[str, Any]) -> list[str]:
    return [name, str(cell["accuracy"]["n"]), *(interval_text(cell[measure]) for measure in MEASURES)]


def figures(result: Mapping[str, Any]) -> list[Figure]:
    titles = {"With the picture": result["picture"]["bins"], "With a blank picture": result["blank"]["bins"]}
    titles["After temperature scaling (other half)"] = result["temperature_scaling"].get("bins_after", [])
    return [Figure(name, reliability_diagram([Bin(**part) for part in bins], name)) for name, bins in titles.items() if bins]


def samples(questions: Sequence[Question], records: Sequence[Record], folder: Path, per_kind: int = 12) -> list[Sample]:
    """The surest wrong and the least sure right answers of each subtask; their pictures are written below `folder`."""
    pairs = list(zip(questions, records, strict=True))
    wrong = sorted((pair for pair in pairs if not pair[1]["correct"]), key=lambda pair: -pair[1]["confidence"])
    right = sorted((pair for pair in pairs if pair[1]["correct"]), key=lambda pair: pair[1]["confidence"])
    made = []
    for question, record in (*wrong, *right):
        path = folder / f"{hashlib.sha256(record['key'].encode()).hexdigest()[:16]}.png"
        said = f"{record['said']}, confidence {record['confidence']:.3f}"
        verdict = "right" if record["correct"] else "wrong"
        kind = "neither" if record["said"] == OTHER else ("sure" if record["confidence"] >= 0.9 else "unsure")
        made.append((question, Sample(record["subtask"], question.item.question, verdict, (path, said), bucket=kind)))
    chosen = first_of_each([sample for _, sample in made], per_kind)
    for question, sample in made:
        if any(sample is other for other in chosen):
            write_picture(Path(sample.parts[0]), question.item.picture())
    return chosen


def evaluate(model: Any, processor: Any, settings: Settings) -> dict[str, Any]:
    """Everything in `settings.output`. Every process calls this; the first one writes, and gets the result."""
    folder = Path(settings.output)
    questions, records = measure(model, processor, settings)
    _, unseen = measure(model, processor, replace(settings, output=str(folder / "blank")), is_blank=True)
    if rank() > 0:
        return {}
    result = {**result_of({"picture": records, "blank": unseen}, settings), **provenance(settings, "eval.confidence")}
    for place, group in ((folder, records), (folder / "blank", unseen)):
        write_lines(place / "confidences.jsonl", [r for r in group if not (settings.abstain and r["abstained"])])
    write_json(folder / "calibration.json", result)
    chosen = samples(questions, records, folder / "shown")
    title = f"Confidence: {settings.data}"
    write_text(folder / "report.html", page(title, [result["command"]], tables(result), figures(result), chosen))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    settings = from_command_line(Settings, argv, __doc__)
    if settings is None:
        return
    with joined(settings.device):
        result = evaluate(*load(settings.model, settings.loading), settings)
    for table in tables(result) if result else ():
        print(f"{table.title}. {table.note}")
        print("\n".join("  ".join(f"{cell:<22}" for cell in row) for row in table.rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
