"""What lmms-eval asks and is answered: conversion and model class with small fakes of its API, and runs where it is installed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from orthus.data.schema import Turn
from orthus.data.world.benchmark import MmeItem, small_mme_items
from orthus.data.world.render import picture
from orthus.harness import Answerer, Decoding, Question, Settings, decoding_of, ended, manifests, settings_of, turns_of, yes_or_no
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor

ROOT = Path(__file__).parent.parent
CHECKPOINT = str(ROOT / "checkpoints/orthus-small")
LONG = Decoding(max_new_tokens=128)
LMMS = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def parts() -> tuple[OrthusForConditionalGeneration, OrthusProcessor]:
    return OrthusForConditionalGeneration.from_pretrained(CHECKPOINT).eval(), OrthusProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def items() -> list[MmeItem]:
    return small_mme_items(2)


def asked(items: list[MmeItem]) -> list[Question]:
    return [
        Question("mme", number, (Turn("user", (picture(item.scene), item.questions[0][0])),)) for number, item in enumerate(items)
    ]


# Conversion


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LMMS, Decoding(16, until=("\n\n",))),
        ({}, Decoding()),
        ({"until": None, "max_gen_toks": 8}, Decoding(8)),
        ({"until": "ASSISTANT:"}, Decoding(until=("ASSISTANT:",))),
        ({"until": ["", "\n"], "num_beams": 3.0}, Decoding(num_beams=3, until=("\n",))),
        ({"temperature": 0.7, "top_p": 0.9}, Decoding(do_sample=True, temperature=0.7, top_p=0.9)),
        ({"do_sample": True, "top_k": 5}, Decoding(do_sample=True, top_k=5)),
        ({"temperature": 0.2, "top_p": 1.0, "do_sample": False}, Decoding()),  # MM-Vet
        ({"temperature": 0, "do_sample": True}, Decoding()),
    ],
)
def test_generation_kwargs_become_a_decoding(options: dict[str, Any], expected: Decoding) -> None:
    assert decoding_of(options) == (expected, ())


def test_generation_kwargs_without_a_meaning_are_named() -> None:
    assert decoding_of({"image_aspect_ratio": "original", "max_new_tokens": 4}) == (Decoding(4), ("image_aspect_ratio",))


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": "ten"}, {"max_new_tokens": 1.5}, {"temperature": -1}, {"num_beams": True}, {"until": [3]}],
)
def test_impossible_generation_kwargs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        decoding_of(options)


def test_messages_become_turns(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    blue.save(tmp_path / "blue.png")
    turns = turns_of(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "url": red}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image", "url": str(tmp_path / "blue.png")}]},
        ],
        max_pixels=100,
    )
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].segments == ("Be brief.\n", red, "What?")
    assert turns[2].segments[0] == "And" and turns[2].segments[1].getpixel((0, 0)) == (0, 0, 255)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "video"),
        ([{"role": "user", "content": [{"type": "audio", "url": {}}]}], "audio"),
        ([{"role": "user", "content": [{"type": "image", "url": "https://example.org/a.png"}]}], "not downloaded"),
        ([{"role": "user", "content": "hello"}, {"role": "system", "content": "late"}], "must follow"),
        ([{"role": "tool", "content": "hello"}], "tool"),
    ],
)
def test_messages_that_cannot_be_answered_are_refused(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        turns_of(messages, 100)


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [("a\n\nb", ["\n\n"], "a"), ("a b c", ["c", "b"], "a "), ("a", [], "a"), ("a", ["z"], "a")],
)
def test_text_ends_before_the_first_stop(text: str, until: list[str], expected: str) -> None:
    assert ended(text, until) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes"), ("Yes, there is.", "yes"), ("There is no dog", "no"), ("I do not know", "I do not know"), ("eyes", "eyes")],
)
def test_yes_or_no_alone(text: str, expected: str) -> None:
    assert yes_or_no(text) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modality": "video"}, "modality"),
        ({"modality": "image"}, "output_dir"),
        ({"guidance": 2.0, "output_dir": "x"}, "output_dir, guidance: for drawing"),
        ({"final_anwser": True}, "final_anwser.*final_answer"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        settings_of(options)


# Answers


def test_answers_do_not_depend_on_the_batch(parts: Any, items: list[MmeItem]) -> None:
    answerer, questions = Answerer(*parts, Settings()), asked(items[:4])
    together = answerer.answer(questions, LONG)
    assert together == [answerer.answer([question], LONG)[0] for question in questions]
    assert all("Answer: " in answer for answer in together)


def test_final_answer_alone_is_what_the_benchmark_expects(parts: Any, items: list[MmeItem]) -> None:
    found = Answerer(*parts, Settings(final_answer=True, yes_no=True)).answer(asked(items), LONG)
    assert sum(answer == item.questions[0][1] for answer, item in zip(found, items, strict=True)) >= len(items) - 1


def test_budget_and_stop_strings_cut_the_text(parts: Any, items: list[MmeItem]) -> None:
    answerer, questions = Answerer(*parts, Settings()), asked(items[:1])
    whole = answerer.answer(questions, LONG)[0]
    short = answerer.answer(questions, Decoding(max_new_tokens=3))[0]
    assert whole.startswith(short) and len(short) < len(whole)
    assert answerer.answer(questions, Decoding(128, until=(". Answer",)))[0] == whole.partition(". Answer")[0]


def test_sampling_is_a_question_s_own(parts: Any, items: list[MmeItem]) -> None:
    answerer, questions = Answerer(*parts, Settings()), asked(items[:3])
    hot = Decoding(20, do_sample=True, temperature=3.0)
    together = answerer.answer(questions, hot)
    assert together == answerer.answer(questions[::-1], hot)[::-1]
    again = [Question(question.task, question.doc_id, question.turns, repeat=1) for question in questions]
    assert answerer.answer(again, hot) != together


def test_a_prompt_without_room_is_answered_with_nothing(parts: Any, items: list[MmeItem], caplog: Any) -> None:
    question = asked(items[:1])[0]
    endless = Question("mme", 9, (Turn("user", ("red " * 4000,)),))
    answerer = Answerer(*parts, Settings())
    assert answerer.answer([endless, question], LONG) == ["", *answerer.answer([question], LONG)]
    assert "mme 9-0" in caplog.text
    assert answerer.answer([endless], LONG) == [""]


def test_a_budget_beyond_the_positions_is_cut_to_what_is_left(parts: Any, items: list[MmeItem], caplog: Any) -> None:
    answerer, questions = Answerer(*parts, Settings()), asked(items[:1])
    assert answerer.answer(questions, Decoding(max_new_tokens=10**6)) == answerer.answer(questions, LONG)
    assert "of the 1000000 asked for" in caplog.text


def test_pictures_are_files_and_do_not_depend_on_the_batch(parts: Any, tmp_path: Path) -> None:
    settings = Settings("interleaved", str(tmp_path / "a"), guidance=2.0, max_images=1, force_image=True, num_diffusion_steps=4)
    questions = [
        Question("draw/it", place, (Turn("user", (text,)),)) for place, text in enumerate(("a photo of a star", "a moon"))
    ]
    few = Decoding(max_new_tokens=24)  # a task's budget is for words: a whole picture is drawn nevertheless
    answers = [json.loads(answer) for answer in Answerer(*parts, settings).answer(questions, few)]
    assert [answer["images"] for answer in answers] == [[str(tmp_path / f"a/draw_it/{place}-0-0.png")] for place in (0, 1)]
    assert all(isinstance(answer["text"], str) for answer in answers)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["0-0-0.png", "1-0-0.png"]
    first = (tmp_path / "a/draw_it/1-0-0.png").read_bytes()
    repeated = Question("draw/it", 1, questions[1].turns, repeat=1)
    Answerer(*parts, settings).answer([questions[1], repeated], few)
    assert (tmp_path / "a/draw_it/1-0-0.png").read_bytes() == first
    assert (tmp_path / "a/draw_it/1-1-0.png").read_bytes() != first


def test_an_unanswerable_drawing_has_the_same_form(parts: Any, tmp_path: Path) -> None:
    endless = Question("draw", 0, (Turn("user", ("red " * 4000,)),))
    answer = Answerer(*parts, Settings("image", str(tmp_path))).answer([endless], Decoding())
    assert json.loads(answer[0]) == {"text": "", "images": []}


# The model class


def fake(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


class FakeLmms:
    """The parts of lmms-eval's base class that ours builds on."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    rank = property(lambda self: self._rank)


@pytest.fixture
def chat_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": FakeLmms}}
    for name, contents in modules.items():
        monkeypatch.setitem(sys.modules, name, fake(name, **contents))
    monkeypatch.delitem(sys.modules, "orthus.lmms_eval", raising=False)
    yield importlib.import_module("orthus.lmms_eval").OrthusChat
    del sys.modules["orthus.lmms_eval"]


@pytest.fixture
def chat(chat_class: Any, items: list[MmeItem]) -> Any:
    made = chat_class(CHECKPOINT, device="cpu", batch_size="2", final_answer=True)
    made.task_dict = {"mme": {"test": [{"image": picture(item.scene), "question": item.questions[0][0]} for item in items]}}
    return made


def messages_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def request(
    doc_id: int, options: dict[str, Any], is_padding: bool = False, doc_to_messages: Any = messages_of
) -> SimpleNamespace:
    arguments = ("context", doc_to_messages, options, doc_id, "mme", "test")
    return SimpleNamespace(args=arguments, metadata={"__padding_only__": True} if is_padding else {})


def test_answers_come_in_the_order_of_the_requests(chat: Any, items: list[MmeItem]) -> None:
    long, short = {"max_new_tokens": 128}, {"max_new_tokens": 2, "until": ["\n"]}
    requests = [request(0, long), request(1, short), request(2, long), request(3, long), request(3, long, is_padding=True)]
    expected = chat.answerer.answer(asked(items), LONG)
    found = chat.generate_until(requests)
    assert [found[0], *found[2:]] == [expected[0], expected[2], expected[3], ""]
    assert found[1] == chat.answerer.answer(asked(items)[1:2], Decoding(2))[0]
    assert (chat.device.type, chat.rank, chat.batch_size, chat.is_simple) == ("cpu", 0, 2, False)


def test_repetitions_are_told_apart(chat: Any) -> None:
    hot = {"max_new_tokens": 20, "temperature": 3.0}
    same = request(0, hot)
    first, second = chat.generate_until([same, same])
    assert first != second and chat.generate_until([same, same]) == [first, second]


def test_unused_options_are_warned_about_once(chat: Any, caplog: Any) -> None:
    chat.generate_until([request(0, {"max_new_tokens": 1, "image_aspect_ratio": "pad"})] * 2)
    assert caplog.text.count("image_aspect_ratio='pad'") == 1


def test_rounds_go_on_until_the_task_ends_them(chat: Any) -> None:
    seen: list[tuple[list[str], Any]] = []

    def rounds(document: dict[str, Any], round_idx: int = 0, previous_output: Any = None, previous_round_info: Any = None) -> Any:
        if round_idx == 0:
            return messages_of(document)
        seen.append((previous_output, previous_round_info))
        return messages_of(document), round_idx == 2, previous_output, f"info {round_idx}"

    long = {"max_new_tokens": 128}
    found = chat.generate_until_multi_round([request(0, long, doc_to_messages=rounds), request(0, long, True, rounds)])
    answer = chat.generate_until([request(0, long)])[0]
    assert found == [[answer, answer], []]
    assert seen == [([answer], None), ([answer, answer], "info 1")]

    def endless(document: dict[str, Any], **_: Any) -> Any:
        return (messages_of(document), False, [], None) if _ else messages_of(document)

    with pytest.raises(ValueError, match="64 rounds"):
        chat.generate_until_multi_round([request(0, {"max_new_tokens": 1}, doc_to_messages=endless)])


def test_likelihoods_are_refused_with_the_reason(chat: Any) -> None:
    with pytest.raises(NotImplementedError, match="chat models"):
        chat.loglikelihood([])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"max_batch_size": 8}, "max_batch_size"),
        ({"system_prompt": "x"}, "system_prompt"),
    ],
)
def test_wrong_model_arguments_are_refused(chat_class: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        chat_class(CHECKPOINT, device="cpu", **options)


def test_each_process_has_a_device_of_its_own(chat_class: Any) -> None:
    import torch

    choose = sys.modules[chat_class.__module__]._device  # type: ignore[attr-defined]
    second = SimpleNamespace(device=torch.device("cuda:1"), num_processes=2)
    assert choose(second, None) == choose(second, "cuda") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device=cuda:0 for 2 processes"):
        choose(second, "cuda:0")
    assert choose(SimpleNamespace(device=torch.device("cuda:0"), num_processes=1), "cuda:3") == torch.device("cuda:3")
    assert choose(SimpleNamespace(device=torch.device("cpu"), num_processes=1), "cuda") == torch.device(
        "cuda"
    )  # torch then raises


def test_the_entry_point_leads_to_the_class(monkeypatch: pytest.MonkeyPatch, chat_class: Any) -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    group = lines.index('[project.entry-points."lmms_eval.models"]')
    assert lines[group + 1] == f'orthus = "{manifests.__module__}:{manifests.__name__}"'
    for name in ("lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, fake(name, ModelManifest=SimpleNamespace))
    assert manifests().model_id == "orthus"
    assert manifests().chat_class_path == f"{chat_class.__module__}.{chat_class.__name__}"


# Where lmms-eval is installed (an environment of its own: pip install 'orthus[lmms]' pytest)


def evaluate(folder: Path, task: str, model_args: str) -> dict[str, Any]:
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import list_available_models
    from lmms_eval.tasks import TaskManager

    assert "orthus" in list_available_models(), "reinstall orthus here: its entry point is not registered"
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="orthus")
    return simple_evaluate(
        "orthus", model_args, tasks=[task], task_manager=manager, batch_size=8, device="cpu", bootstrap_iters=0
    )


def test_small_mme_in_lmms_eval_scores_as_our_own_grading(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    from eval.mme.grading import score_subtask
    from eval.mme.items import small_world_items, write_parquet

    questions = small_world_items(4)
    write_parquet(questions, tmp_path / "small.parquet")
    task = (ROOT / "eval/lmms/small_mme.yaml").read_text()
    assert "../../runs/small-mme.parquet" in task
    (tmp_path / "small_mme.yaml").write_text(task.replace("../../runs/small-mme.parquet", "small.parquet"))
    result = evaluate(tmp_path, "small_mme", f"pretrained={CHECKPOINT},final_answer=True,yes_no=True")
    said = {sample["doc_id"]: sample["filtered_resps"] for sample in result["samples"]["small_mme"]}
    answers = [said[place] if isinstance(said[place], str) else said[place][0] for place in range(len(questions))]
    assert set(answers) <= {"yes", "no"}
    records = [question.record(answer) for question, answer in zip(questions, answers, strict=True)]
    total = sum(
        score_subtask([record for record, question in zip(records, questions, strict=True) if question.subtask == subtask]).score
        for subtask in ("existence", "count", "position", "color")
    )
    assert result["results"]["small_mme"]["mme_perception_score,none"] == pytest.approx(total)
    assert total > 700


def test_tasks_of_lmms_eval_that_want_pictures_find_ours(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    prompts = ["a photo of a star", "a photo of a red moon"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "found.py").write_text(
        "from lmms_eval.tasks.WISE.utils import _image_from_prediction, _load_prediction\n"
        "def prompt(document, lmms_eval_specific_kwargs=None):\n    return document['prompt']\n"
        "def pictures(document):\n    return []\n"
        "def found(document, results):\n    return {'found': float(bool(_image_from_prediction(_load_prediction(results))))}\n"
    )
    (tmp_path / "drawing.yaml").write_text(
        "task: drawing\ndataset_path: json\ndataset_kwargs: {data_files: {test: prompts.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_visual: !function found.pictures\ndoc_to_text: !function found.prompt\n"
        "doc_to_target: prompt\nprocess_results: !function found.found\n"
        "generation_kwargs: {max_new_tokens: 64, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}\n"
        "metric_list: [{metric: found, aggregation: mean, higher_is_better: true}]\n"
    )
    model_args = f"pretrained={CHECKPOINT},modality=interleaved,force_image=True,max_images=1,output_dir={tmp_path / 'out'}"
    assert evaluate(tmp_path, "drawing", model_args)["results"]["drawing"]["found,none"] == 1.0
