"""Grading a folder: the small world's grader, a stand-in for the published script, resuming, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.geneval import __main__ as cli
from eval.geneval.__main__ import main
from eval.geneval.detectors import Grader, crop_of
from eval.geneval.folders import read_folder
from eval.geneval.grading import grade_folder, read_detections
from eval.geneval.prompts import lines_sha256
from eval.geneval.selftest import RGB, known_pictures, require_working_grader
from eval.geneval.verdict import COLORS, Detection
from orthus.data.world.benchmark import ground_truth_scene, small_geneval_items
from orthus.data.world.render import picture

NUM_SAMPLES = 2


@pytest.fixture
def world(tmp_path):
    """A folder of true pictures of six prompts, two each, with its manifest."""
    items = small_geneval_items(1)
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    lines = [json.dumps(item) for item in items]
    for number, item in enumerate(items):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(lines[number] + "\n")
        for sample in range(NUM_SAMPLES):
            picture(ground_truth_scene(item, rng)).save(samples / f"{sample:05d}.png")
    manifest = {"prompt_set": "small", "prompts_sha256": lines_sha256(lines), "num_samples": NUM_SAMPLES}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def grade(folder, *more):
    return main(["grade", str(folder), "--detector", "world", *more])


def test_true_pictures_are_correct_and_the_same_command_changes_nothing(world, tmp_path, capsys):
    output = tmp_path / "graded"
    assert grade(world, "--output", str(output)) == 0
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len(results) == 12 and all(result["correct"] for result in results)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert grade(world, "--output", str(output)) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert main(["rescore", str(output / "detections.jsonl"), str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == before["results.jsonl"]
    assert main(["summary", str(output / "results.jsonl"), "--allow-partial"]) == 0
    assert main(["summary", str(output / "results.jsonl")]) == 2


def test_processes_share_the_pictures_and_a_killed_run_goes_on(world, tmp_path, monkeypatch, capsys):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert grade(world, "--output", str(whole)) == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("2", "0"):
        monkeypatch.setenv("RANK", rank)
        assert grade(world, "--output", str(shared)) == 0 and not (shared / "results.jsonl").exists()
    assert "others are not done yet" in capsys.readouterr().out
    assert len(read_detections(shared)) == 8
    shard = shared / "detections.rank2.jsonl"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert len(read_detections(shared)) == 7
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert grade(world, "--output", str(shared)) == 0
    for name in ("results.jsonl", "detections.jsonl"):
        assert (shared / name).read_bytes() == (whole / name).read_bytes()


def truncate(folder):
    path = folder / "00002" / "samples" / "00001.png"
    path.write_bytes(path.read_bytes()[:-300])


def change_metadata(folder):
    path = folder / "00001" / "metadata.jsonl"
    path.write_text(path.read_text().replace("a photo", "the photo").replace("a picture", "the picture").replace("a ", "one "))


def remove_tree(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "00002/samples/00001.png"),
        (lambda folder: (folder / "00000/samples/00000.png").write_bytes(b""), "00000/samples/00000.png"),
        (lambda folder: (folder / "00003/samples/00001.png").unlink(), "holds 1 pictures instead of 2"),
        (lambda folder: (folder / "00003/samples/00000.png").unlink(), "missing or extra"),
        (lambda folder: (folder / "00003/samples/00002.png").write_bytes(b"x"), "holds 3 pictures instead of 2"),
        (lambda folder: (folder / "00003/samples/notes.txt").write_bytes(b"x"), "'notes.txt'"),
        (lambda folder: (folder / "00003/samples/00001.png.part").write_bytes(b"x"), "00001.png.part"),
        (change_metadata, "are not those of its manifest.json"),
        (lambda folder: (folder / "00001/metadata.jsonl").write_text("{}\n{}\n"), "metadata.jsonl cannot be read"),
        (lambda folder: (folder / "00001/metadata.jsonl").unlink(), "metadata.jsonl cannot be read"),
        (lambda folder: remove_tree(folder / "00002"), "no folder 00002"),
        (lambda folder: remove_tree(folder / "00005"), "are not those of its manifest.json"),
        (lambda folder: (folder / "0006").mkdir(), "no folder"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is no manifest"),
        (lambda folder: (folder / "results.jsonl").write_text("{}\n"), "no grading.json says who graded it"),
    ],
)
def test_damaged_folders_are_refused_and_nothing_is_written(world, damage, message, capsys):
    damage(world)
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    assert grade(world) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in world.rglob("*") if path.is_file()} == before


def test_without_a_manifest_folders_must_still_agree(world, capsys):
    (world / "manifest.json").unlink()
    assert read_folder(world).prompt_set == "unrecorded" and read_folder(world).num_samples == NUM_SAMPLES
    (world / "00005/samples/00001.png").unlink()
    assert grade(world) == 2 and "holds 1 pictures instead of 2" in capsys.readouterr().err


def test_a_manifest_cannot_call_other_prompts_official(world):
    manifest = json.loads((world / "manifest.json").read_text())
    (world / "manifest.json").write_text(json.dumps({**manifest, "prompt_set": "official"}))
    with pytest.raises(ValueError, match="says official"):
        read_folder(world)


def test_changed_pictures_and_other_graders_need_another_output(world, capsys):
    assert grade(world) == 0
    Image.new("RGB", (64, 64), "white").save(world / "00000/samples/00000.png")
    assert grade(world) == 2 and "changed after its detections" in capsys.readouterr().err
    other = Grader(StandIn(), None, {}, 0.05, {"grader": "hf"})
    with pytest.raises(ValueError, match="grader is 'world' there, 'hf' here"):
        grade_folder(read_folder(world), other, world)


class StandIn:
    """Finds the self-test's person; `shift` moves the box."""

    def __init__(self, shift=0.0, name="person", score=0.99):
        self.shift, self.name, self.score = shift, name, score

    def detect(self, image):
        x = 688.0 if image.size == (1200, 600) else 0.0
        return [
            Detection(self.name, self.score, (15 + x + self.shift, 20.0, 510 + x + self.shift, 600.0)),
            Detection("tie", 0.5, (220.0, 400.0, 300.0, 500.0)),
        ]


class Nearest:
    """Names the colour in a crop's middle; `names` may be wrong."""

    def __init__(self, names=COLORS):
        self.names = dict(zip(COLORS, names, strict=True))

    def classify(self, crops, class_name):
        middles = [np.array(crop.getpixel((crop.width // 2, crop.height // 2)), int) for crop in crops]
        return [self.names[min(RGB, key=lambda name: np.abs(middle - RGB[name]).sum())] for middle in middles]


class Blind:
    def detect(self, image):
        return []


@pytest.mark.parametrize(
    ("detector", "colors", "message"),
    [
        (StandIn(), Nearest(), None),
        (Blind(), None, "nothing found"),
        (StandIn(name="cat"), None, "is cat"),
        (StandIn(score=0.9), None, "not above 0.9"),
        (StandIn(shift=90.0), None, "scaled or moved"),
        (StandIn(), Nearest(COLORS[::-1]), "red is called white"),
    ],
)
def test_the_self_test_names_what_is_wrong(detector, colors, message):
    grader = Grader(detector, colors, {}, 0.05)
    if message is None:
        require_working_grader(grader)
        return
    with pytest.raises(ValueError, match=message):
        require_working_grader(grader)


def test_hf_grades_only_after_its_self_test(world, tmp_path, monkeypatch, capsys):
    for detector, code in ((Blind(), 2), (StandIn(), 0)):
        monkeypatch.setattr(cli, "_grader", lambda args, it=detector: Grader(it, Nearest(), {}, 0.05, {"grader": "hf"}))
        output = tmp_path / str(code)
        assert main(["selftest", "--detector", "hf"]) == code
        assert main(["grade", str(world), "--detector", "hf", "--output", str(output)]) == code
        assert output.exists() == (code == 0)
    assert "self-test failed, nothing is scored" in capsys.readouterr().err


SCRIPT = """
import argparse, json, os
p = argparse.ArgumentParser()
p.add_argument("imagedir"); p.add_argument("--outfile"); p.add_argument("--model-path"); p.add_argument("--options", nargs="*")
a = p.parse_args()
assert "RANK" not in os.environ
rows = []
for folder in sorted(os.listdir(a.imagedir), reverse=True):
    if not folder.isdigit(): continue
    metadata = json.load(open(os.path.join(a.imagedir, folder, "metadata.jsonl")))
    for name in os.listdir(os.path.join(a.imagedir, folder, "samples")):
        box = BOXES[int(folder)] if metadata["prompt"] == "a photo of a person" else [0, 0, 9, 9, 0.5]
        rows.append(dict(filename=os.path.join(a.imagedir, folder, "samples", name), tag=metadata["tag"],
            prompt=metadata["prompt"], correct=True, reason="",
            metadata=json.dumps(metadata), details=json.dumps({"person": [box]})))
with open(a.outfile, "w") as fp:
    for row in rows[FIRST:]: print(json.dumps(row), file=fp)
raise SystemExit(CODE)
"""


def official(folder, tmp_path, boxes="([12, 22, 512, 600, 0.99], [700, 22, 1200, 600, 0.99])", first="0", code="0"):
    script = tmp_path / "checkout" / "evaluation" / "evaluate_images.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPT.replace("BOXES", boxes).replace("FIRST", first).replace("CODE", code))
    more = ["--official-python", sys.executable, "--official-repo", str(tmp_path / "checkout"), "--model-path", str(tmp_path)]
    return main(["grade", str(folder), "--detector", "official", "--output", str(tmp_path / "official"), *more])


def test_the_published_script_runs_in_its_own_process(world, tmp_path, capsys):
    assert official(world, tmp_path) == 0
    results = [json.loads(line) for line in (tmp_path / "official" / "results.jsonl").read_text().splitlines()]
    assert [Path(result["filename"]).parts[-3] for result in results] == [
        f"{n:05d}" for n in range(6) for _ in range(NUM_SAMPLES)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code": "3"}, "ended with 3"),
        ({"first": "1"}, "not those of the 2 pictures"),
        ({"boxes": "([12, 22, 512, 600, 0.02], [0, 0, 1, 1, 0.02])"}, "self-test failed"),
    ],
)
def test_a_script_that_fails_leaves_nothing(settings, message, world, tmp_path, capsys):
    assert official(world, tmp_path, **settings) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "official").exists()


def test_missing_settings_are_named(world, tmp_path, capsys):
    assert main(["grade", str(world), "--detector", "official"]) == 2 and "--official-python" in capsys.readouterr().err
    assert main(["selftest", "--detector", "world"]) == 2 and "no photographs" in capsys.readouterr().err
    assert grade(world, "--options", "threshold=0.3") == 2 and "change nothing" in capsys.readouterr().err


def test_crops_show_the_object_on_grey_or_on_the_picture():
    image = Image.new("RGB", (8, 6), "red")
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    found = Detection("cup", 0.9, (2.4, 1.6, 6.0, 4.0), mask=mask)
    crop = crop_of(image, found, {})
    assert crop.size == (4, 2) and crop.getpixel((0, 0)) == (153, 153, 153) and crop.getpixel((1, 1)) == (255, 0, 0)
    assert crop_of(image, found, {"bgcolor": "original"}).getpixel((0, 0)) == (255, 0, 0)
    assert crop_of(image, found, {"crop": "0"}).size == (8, 6)
    with pytest.raises(ValueError, match="mask"):
        crop_of(image, Detection("cup", 0.9, (0.0, 0.0, 1.0, 1.0), mask=mask.T), {})


def test_the_photograph_is_there():
    known = known_pictures()
    assert [one.image.size for one in known.values()] == [(512, 600), (1200, 600)]
