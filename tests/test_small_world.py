"""The small-world command with a model that knows all answers, one that is silent, and a resumed run."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import floors, report, small_world
from eval.mme.generate import Settings as MmeSettings
from eval.mme.generate import requests_of
from eval.mme.items import in_mme_form
from eval.provenance import check_manifest, provenance
from eval.whole_files import write_json
from orthus.data.world.benchmark import ground_truth_scene
from orthus.data.world.render import picture


class Batch(dict):
    def to(self, device):
        return self


class FakeProcessor:
    """Hands prompts over as they are; `image_processor` is the identity."""

    separator_token_id = 1
    image_processor = SimpleNamespace(pixel_values=lambda images: torch.stack([torch.tensor(np.asarray(i)) for i in images]))

    def __init__(self):
        self.image_processor.postprocess = lambda values: [floors.Image.fromarray(v.numpy()) for v in values]

    def __call__(self, turns):
        return Batch(prompts=[row[0].segments for row in turns])

    def guidance_streams(self, turns, guidance, image_guidance=None, text_guidance=1.0):
        return {"guidance": guidance, "negative_input_ids": torch.zeros(1, 1)}

    def decode_segments(self, output):
        return output.answers


def key_of(segments):
    return tuple(s if isinstance(s, str) else s.tobytes() for s in segments)


class Oracle:
    """Answers from a table; counts its calls; `fail_after` calls it is interrupted."""

    device = torch.device("cpu")

    def __init__(self, table, fail_after=10**9):
        self.table, self.num_calls, self.fail_after, self.seeds = table, 0, fail_after, []

    def generate(self, prompts, generator, **options):
        self.num_calls += 1
        if self.num_calls > self.fail_after:
            raise KeyboardInterrupt
        self.seeds += [g.initial_seed() for g in generator]
        answers = [self.table.get(key_of(prompt), []) for prompt in prompts]
        return SimpleNamespace(sequences=torch.ones(len(prompts), 1, dtype=torch.long), answers=answers)

    get_image_latents = staticmethod(lambda values: values)
    decode_image_latents = staticmethod(lambda latents: latents)


def right_answers(items):
    rng = np.random.default_rng(0)
    table = {(item["prompt"],): [picture(ground_truth_scene(item, rng))] for item in items.geneval}
    questions = in_mme_form(items.mme)
    for request, item in zip(requests_of(questions, MmeSettings("", "")), questions, strict=True):
        table[key_of(request.read())] = [f"nothing that is graded: yes, no. Answer: {item.truth}"]
    for request, (_, truth) in zip(
        small_world.describe_requests([scene for scene, _ in items.descriptions]), items.descriptions, strict=True
    ):
        table[key_of(request.segments)] = [", ".join(reversed(truth.split(", ")))]
    for request, item in zip(small_world.edit_requests(items.edits), items.edits, strict=True):
        table[key_of(request.segments)] = [picture(item.edit.after)]
    for request, item in zip(small_world.story_requests(items.stories), items.stories, strict=True):
        said = [
            part for text, scene in zip(item.story.texts, item.story.pictures, strict=True) for part in (text, picture(scene))
        ]
        table[key_of(request.segments)] = said + ([item.story.closing] if item.story.closing else [])
    return table


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "majority_answers", dict)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return small_world.Settings(
        model=str(tmp_path), output=str(tmp_path / "run"), num_per_task=4, num_edits=6, num_stories=4, batch_size=8
    )


def test_a_model_that_knows_everything_scores_one(settings, tmp_path):
    items = small_world.make_items(settings)
    result = small_world.evaluate(Oracle(right_answers(items)), FakeProcessor(), settings)
    for name in ("small_geneval", "small_geneval_direct", "small_mme", "describing", "editing", "interleaved"):
        assert result[name]["overall"]["value"] == 1.0, name
    assert result["small_mme"]["score"]["value"] == 800.0 and result["interleaved"]["well_formed"]["value"] == 1.0
    assert result["editing"]["do_nothing"]["value"] == 0.0
    assert all(row["agreement"] == 1.0 for row in result["grader"].values())
    result |= provenance(settings)
    write_json(tmp_path / "run" / "results.json", result)
    report.main(["--run", str(tmp_path / "run"), "--html", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page and "data:image/png;base64," in page and "Small GenEval" in page
    report.main(["--results", str(tmp_path / "run" / "results.json"), "--markdown", str(tmp_path / "RESULTS.md")])
    assert re.search(r"\| overall \| 1\.000 \[0\.\d{3}, 1\.000\] \| 24 \|", (tmp_path / "RESULTS.md").read_text())
    write_json(tmp_path / "argmin.json", {"small_mme": result["small_mme"], "command": "c"})
    results = ["--results", str(tmp_path / "run" / "results.json"), "--beside", str(tmp_path / "argmin.json")]
    report.main([*results, "--markdown", str(tmp_path / "RESULTS.md")])
    written = (tmp_path / "RESULTS.md").read_text()
    assert "| argmin |  |  | 1.000 [" in written and written.count("\n## ") == 2


def test_some_tasks_on_their_own(settings):
    chosen = replace(settings, tasks=("mme", "describe"))
    result = small_world.evaluate(Oracle(right_answers(small_world.make_items(chosen))), FakeProcessor(), chosen)
    assert result["describing"]["overall"]["value"] == result["small_mme"]["overall"]["value"] == 1.0
    assert "small_geneval" not in result and not (small_world.Path(chosen.output) / "geneval").exists()
    with pytest.raises(ValueError, match="task 'mmee' is unknown"):
        replace(settings, tasks=("mmee",))


def test_a_silent_model_scores_zero(settings):
    items = small_world.make_items(settings)
    with pytest.raises(ValueError, match=r"24 answers hold no picture \(the first: 00000/00000\)"):
        small_world.generate(Oracle({}), FakeProcessor(), items, settings)
    settings = replace(settings, tasks=("mme", "describe", "edit", "story"))
    answers = small_world.generate(Oracle({}), FakeProcessor(), items, settings)
    folder = small_world.Path(settings.output)
    mme = small_world.report_mme(items.mme, folder / "mme", "official")
    assert mme["overall"]["value"] == 0.0 and mme["count"]["other_rate"] == 1.0
    assert small_world.report_descriptions(items.descriptions, answers["describe"], folder)["objects"]["value"] == 0.0
    assert small_world.report_edits(items.edits, answers["edit"], folder)["overall"]["value"] == 0.0
    assert small_world.report_stories(items.stories, answers["story"], folder)["well_formed"]["value"] == 0.0


def test_a_folder_of_other_settings_is_refused(settings):
    folder = small_world.Path(settings.output)
    check_manifest(folder, settings)
    check_manifest(folder, settings)
    with pytest.raises(ValueError, match=rf"guidance {settings.guidance} -> 1.5.*another output="):
        check_manifest(folder, replace(settings, guidance=1.5))
    record = json.loads((folder / "manifest.json").read_text())
    assert record["settings"]["guidance"] == settings.guidance
