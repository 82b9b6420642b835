"""Commands of eval: wrong input ends with one line and exit code 2, and a misspelt model folder at once."""

import runpy
import sys
from pathlib import Path

import pytest

from eval.exits import exit_code
from eval.loading import ModelSettings, load, require_model

COMMANDS = {
    "consistency": (["nonsense=1"], "nonsense"),
    "confidence": (["model=./none", "output={folder}"], "'./none' is no folder"),
    "picture_metrics": (["clip", "{folder}/none"], "none"),
    "export": (["imgedit", "prompts={folder}/none.json", "answers={folder}", "output={folder}/new"], "images="),
    "reconstruction": (["model={folder}/none", "output={folder}/new"], "none' is no folder"),
    "small_world": (["model={folder}/none", "output={folder}/new", "tasks=[mme]"], "none' is no folder"),
    "report": (["--results", "{folder}/none.json", "--markdown", "{folder}/x.md"], "none.json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_input_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = COMMANDS[name]
    monkeypatch.setattr(sys, "argv", [name, *(argument.format(folder=tmp_path) for argument in arguments)])
    monkeypatch.delitem(sys.modules, f"eval.{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"eval.{name}", run_name="__main__", alter_sys=True)
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and last.startswith("error: ") and message in last


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> None:
        raise error

    assert exit_code(lambda argv: None, ["x"]) == 0
    assert exit_code(lambda argv: fail(OSError("one\n  two"))) == 2
    assert capsys.readouterr() == ("", "error: one two\n")
    with pytest.raises(KeyError):
        exit_code(lambda argv: fail(KeyError("ours")))


def test_a_misspelt_model_folder_is_refused_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "weights.bin").touch()
    for name in ("runs/smal", "./small", "../none", str(tmp_path / "none"), "weights.bin"):
        with pytest.raises(ValueError, match="is no folder; give the folder of a model"):
            load(name, ModelSettings())
    for name in ("runs/small", "somebody/orthus", str(tmp_path)):
        require_model(name)
