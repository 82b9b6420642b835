"""Questions with a few possible answers, and how probable a model finds each of them where its answer stands.

Probability of an answer: of the first tokens of its spellings ("yes", "Yes", ...) at that place, by one teacher-forced forward of
the prompt and what the model said before. A first token that two answers share tells nothing and is left out.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eval.answers import Request
from eval.mme.grading import read_truth
from eval.mme.items import Item
from orthus.data.schema import Turn
from orthus.data.sources.records import Pictures
from orthus.training.distributed import rank, world_size

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""How LLaVA-1.5 (arXiv 2310.03744) asks for a letter."""
MAX_OPTIONS = 26
OTHER = "other"
Choices = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Question:
    """`choices`: spellings of each answer; `picture`: what is resampled; `read`: from words to one of `choices`, or `OTHER`."""

    item: Item
    request: Request
    choices: Choices
    picture: str
    read: Callable[[str], str]

    @property
    def truth(self) -> str:
        return read_truth(self.item.truth) if "yes" in self.choices else self.item.truth


def yes_no(item: Item, request: Request, read: Callable[[str], str]) -> Question:
    """A question in MME's form."""
    return Question(item, request, {word: _spelled(word) for word in ("yes", "no")}, item.picture_key, read)


def multiple_choice(item: Item, request: Request, options: Sequence[str], picture: str) -> Question:
    """A question whose answer is a letter, or the words of that option."""
    choices = {letter: (letter, f" {letter}", *_spelled(words)) for letter, words in _lettered(options)}
    return Question(item, request, choices, picture, partial(read_choice, options=options))


def _spelled(words: str) -> tuple[str, ...]:
    large = words[:1].upper() + words[1:]
    return (words, large, f" {words}", f" {large}")


def _lettered(options: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(string.ascii_uppercase, options, strict=False))


def read_choice(text: str, options: Sequence[str]) -> str:
    """The letter that a text is ("B", "(B)", "B. red") or whose words it is ("red."), or `OTHER`."""
    found = re.match(r"\s*\(?([A-Z])(?:[).:,]|\s*$)", text)
    letters = dict(_lettered(options))
    if found and found[1] in letters:
        return found[1]
    said = text.strip().rstrip(".").lower()
    return next((letter for letter, words in letters.items() if words.lower() == said), OTHER)


@dataclass(frozen=True)
class Choice:
    """One multiple-choice question as it is kept: `item.truth` is the letter, `picture` what several may share."""

    item: Item
    options: tuple[str, ...]
    picture: str


def read_choices(path: Path) -> list[Choice]:
    """Lines `{"image": file beside `path`, "question", "options": [...], "answer": letter or words, "subtask" (optional)}`.

    Raises `ValueError` with the number of a line that is not so.
    """
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [_read_choice(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_choice(path: Path, number: int, line: str) -> Choice:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
        image, question, options, answer = (record[name] for name in ("image", "question", "options", "answer"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {line[:80]!r} is not an object with image, question, options, answer ({error})") from error
    is_list = isinstance(options, list) and all(isinstance(words, str) and words.strip() for words in options)
    if not is_list or not 2 <= len({words.lower() for words in options}) == len(options) <= MAX_OPTIONS:
        raise ValueError(f"{where}: options {options!r}; give 2 to {MAX_OPTIONS} different texts")
    truth = read_choice(str(answer), options)
    if truth == OTHER:
        raise ValueError(f"{where}: answer {answer!r} is none of the options {options}; give its letter or its words")
    listed = "\n".join(f"{letter}. {words}" for letter, words in _lettered(options))
    prompt, subtask = f"{question}\n{listed}\n{INSTRUCTION}", str(record.get("subtask", "choice"))
    item = Item(subtask, f"{number:05d}-{image}", prompt, truth, partial(Pictures(str(path.parent)), image))
    return Choice(item, tuple(options), str(image))


def first_tokens(processor: Any, choices: Choices) -> dict[str, list[int]]:
    """The tokens with which each answer, and no other, begins. Raises `ValueError` for an answer that has none."""
    begins = {name: {processor.encode_text(text)[0] for text in spellings} for name, spellings in choices.items()}
    owners = Counter(token for tokens in begins.values() for token in tokens)
    own = {name: sorted(token for token in tokens if owners[token] == 1) for name, tokens in begins.items()}
    lacking = [name for name, tokens in own.items() if not tokens]
    if lacking:
        raise ValueError(
            f"the tokenizer begins {', '.join(lacking)} as it begins other answers of {list(choices)}; name them otherwise"
        )
    return own


def log_probabilities(
    model: Any, processor: Any, questions: Sequence[Question], said: Sequence[str], batch_size: int
) -> list[dict[str, float]]:
    """Log-probability of each answer to each question after the words `said` ("": directly after the prompt).

    Batches are dealt to the processes as in `eval.answers`; every process calls this and gets all.
    """
    starts = range(0, len(questions), batch_size)
    mine = {
        start: _score(model, processor, questions[start : start + batch_size], said[start : start + batch_size])
        for start in starts[rank() :: world_size()]
    }
    everyones = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyones, mine)
    found = {start: scores for part in everyones for start, scores in part.items()}
    return [row for start in starts for row in found[start]]


@torch.no_grad()
def _score(model: Any, processor: Any, questions: Sequence[Question], said: Sequence[str]) -> list[dict[str, float]]:
    inputs = processor(turns=[[Turn("user", question.request.read())] for question in questions])
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    rows = [[*ids, *(processor.encode_text(words) if words else ())] for ids, words in zip(prompts, said, strict=True)]
    width = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([[processor.pad_token_id] * (width - len(row)) + row for row in rows])
    inputs["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    logits = model(**inputs.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
    logs = logits.float().log_softmax(-1).cpu()  # (B, V)
    return [
        {name: float(row[tokens].logsumexp(0)) for name, tokens in first_tokens(processor, question.choices).items()}
        for row, question in zip(logs, questions, strict=True)
    ]
