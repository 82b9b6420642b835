"""generate -> grade -> report as a user runs it, with the shipped checkpoint: processes, kills, damage, two runs side by side."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from eval.geneval.__main__ import device_of_process
from eval.geneval.__main__ import main as geneval
from eval.geneval.prompts import lines_sha256, official_lines
from eval.geneval.report import read_graded
from eval.mme.__main__ import main as mme
from eval.provenance import model_hash

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "orthus-small"
FEW = ["num_per_task=1", "num_samples=2", "batch_size=2"]
pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs checkpoints/orthus-small")


def settings(output: Path, name: str = "small_geneval", *options: str) -> list[str]:
    return [str(ROOT / f"configs/eval/{name}.yaml"), f"model={CHECKPOINT}", f"output={output}", *options]


def launch(num_processes: int, *arguments: str) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*launcher, "-m", "eval.geneval", *arguments], cwd=ROOT, env=environment, start_new_session=True, **pipes
    )


def kept(folder: Path) -> dict[str, bytes]:
    """Answers, pictures and verdicts: all that must be the same however a run went."""
    names = [*folder.glob("geneval.jsonl"), *folder.rglob("*.png"), *folder.rglob("metadata.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert geneval(settings(folder, "small_geneval", *FEW)) == 0
    return folder


def test_a_run_leaves_the_published_folders_results_and_a_page(drawn: Path) -> None:
    assert (drawn / "00005/samples/00001.png").exists() and not (drawn / "00006").exists()
    page = (drawn / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 12 and "http" not in page and "SmallGenEval, small (1 a task" in page
    assert "no published score compares" in page and "random placement" in page
    assert len((drawn / "results.jsonl").read_text().splitlines()) == 12


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_then_three(drawn: Path, tmp_path: Path) -> None:
    started = launch(2, "generate", *settings(tmp_path / "run", "small_geneval", *FEW))
    for _ in range(600):
        if list((tmp_path / "run").rglob("samples/*.png")):
            break
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert 0 < len(list((tmp_path / "run").rglob("*.png"))) < 12
    assert geneval(["grade", str(tmp_path / "run"), "--detector", "world"]) == 2
    assert not (tmp_path / "run" / "results.jsonl").exists()
    done = launch(3, "run", *settings(tmp_path / "run", "small_geneval", *FEW))
    output = done.communicate(timeout=300)[0].decode()
    assert done.returncode == 0, output[-3000:]
    assert kept(tmp_path / "run") == kept(drawn)
    wanted = (drawn / "results.jsonl").read_text().replace(str(drawn).replace("/", "\\/"), "")
    assert (tmp_path / "run" / "results.jsonl").read_text().replace(str(tmp_path / "run").replace("/", "\\/"), "") == wanted


@pytest.mark.parametrize("damage", ["cut-1", "cut-12", "cut-20", "swapped", "missing", "edited", "other-seed", "unfinished"])
def test_damage_is_refused_and_nothing_is_overwritten(
    drawn: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(drawn, tmp_path / "copy"))
    picture, metadata = folder / "00002/samples/00000.png", folder / "00002/metadata.jsonl"
    if damage.startswith("cut-"):
        picture.write_bytes(picture.read_bytes()[: -int(damage[4:])])
    elif damage == "swapped":
        shutil.copy(folder / "00003/samples/00000.png", picture)
    elif damage == "unfinished":
        (folder / "geneval.rank00001.jsonl").write_text("")
    elif damage == "missing":
        picture.unlink()
    elif damage == "edited":
        metadata.write_text(metadata.read_text().replace("photo", "picture"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if damage == "other-seed":
        assert geneval(["generate", *settings(folder, "small_geneval", *FEW, "seed=1")]) == 2
        assert "holds answers of another run (seed 0 -> 1)" in capsys.readouterr().err
    else:
        assert geneval(["grade", str(folder), "--detector", "world"]) == 2
        assert "error: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_report_is_of_all_that_was_graded_and_of_nothing_else(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "grades"
    assert geneval(["grade", str(drawn), "--detector", "world", "--output", str(elsewhere)]) == 0
    assert geneval(["report", str(elsewhere)]) == 0
    assert "SmallGenEval, small (1 a task" in (elsewhere / "report.html").read_text()
    folder = Path(shutil.copytree(drawn, tmp_path / "copy"))
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[1:]))
    assert geneval(["report", str(folder)]) == 2
    assert "has 11 results of 12 pictures" in capsys.readouterr().err
    grading = elsewhere / "grading.json"
    grading.write_text(grading.read_text().replace('"threshold": "0.0"', '"threshold": "0.9"'))
    assert geneval(["compare", str(drawn), str(elsewhere), "--html", str(tmp_path / "x.html")]) == 2
    assert "options.threshold '0.0' -> '0.9'" in capsys.readouterr().err


def test_names_of_benchmarks(drawn: Path) -> None:
    run = read_graded(drawn)
    official = {"prompt_set": "official", "prompts_sha256": lines_sha256(official_lines())}
    for manifest, name in (
        ({**official, "grader": "hf"}, "GenEval[hf]"),
        ({**official, "grader": "official"}, "GenEval"),
        (
            {**official, "prompt_set": "rewritten:1", "prompts_sha256": "x", "grader": "hf"},
            "GenEval[hf] with other prompts (rewritten:1)",
        ),
    ):
        assert replace(run, manifest=manifest).benchmark == name
    assert replace(run, manifest=official).is_official_set and not run.is_official_set


def test_a_changed_config_is_another_model(drawn: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    before = model_hash(model)
    (model / "results.json").write_text("{}")
    assert model_hash(model) == before
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert model_hash(model) != before
    with pytest.raises(ValueError, match="holds no weights"):
        model_hash(ROOT / "configs")


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of_process("cuda") == "cuda" and device_of_process("cuda:1") == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert device_of_process("cuda") == "cuda:3" and device_of_process("cpu") == "cpu"
    with pytest.raises(ValueError, match="names one GPU for all processes"):
        device_of_process("cuda:1")


def test_two_runs_side_by_side(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    assert geneval(settings(other, "small_geneval", *FEW, "decoding.text_guidance=1.0")) == 0
    assert geneval(["compare", str(drawn), str(other), "--html", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "Difference, one minus other" in page and page.count("data:image") == 24 and (tmp_path / "both.json").exists()
    assert geneval(settings(tmp_path / "more", "small_geneval", *FEW[:1], "num_samples=1")) == 0
    assert geneval(["compare", str(drawn), str(tmp_path / "more"), "--html", str(tmp_path / "x.html")]) == 2
    assert "num_samples 2 -> 1" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_questions_answered_graded_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, blank in (("seen", "false"), ("blind", "true")):
        assert mme(settings(tmp_path / name, "small_mme", "num_images=2", f"blank={blank}")) == 0
    assert "perception: " in capsys.readouterr().out
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "data:image/png;base64," in page and "always yes" in page
    seen, blind = (str(tmp_path / name) for name in ("seen", "blind"))
    assert mme(["compare", seen, blind, "--html", str(tmp_path / "both.html")]) == 0
    assert "Difference, seen minus blind" in (tmp_path / "both.html").read_text()
    (tmp_path / "seen/answers/color.txt").unlink()
    assert mme(["report", *settings(tmp_path / "seen", "small_mme", "num_images=2")]) == 2
    assert "holds 12 answers to 16 questions" in capsys.readouterr().err


def test_settings_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert geneval(settings(tmp_path, "small_geneval", "decoding.max_images=2")) == 2
    assert "judges one picture an answer" in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text('{"tag": "colors"}\n')
    assert geneval(settings(tmp_path / "run", "small_geneval", f"prompts={tmp_path / 'prompts.jsonl'}")) == 2
    assert "line 1: it is no object with a prompt" in capsys.readouterr().err
    assert mme(settings(tmp_path, "small_mme", "style=llava")) == 2
    assert "style=llava is unknown; use one of official, lmms, internvl" in capsys.readouterr().err
    assert geneval(settings(tmp_path, "small_geneval", "num_samples=0")) == 2
    assert geneval(["nothing.yaml", "model=x"]) == 2
