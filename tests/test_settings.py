"""Settings files are strict: every mistake names its key, its value and the remedy."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import pytest

from orthus.training.settings import OptimSettings, RunSettings, differences, load_settings, save, to_dict


@dataclasses.dataclass(frozen=True)
class Stage:
    run: RunSettings
    name: str = "stage"
    optim: OptimSettings = OptimSettings()
    warm_start: Path | None = None
    sizes: tuple[int, ...] = (1,)
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    kind: Literal["a", 2] = "a"
    tasks: list[str] = dataclasses.field(default_factory=list)
    is_packed: bool = True
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    threshold: int | float | None = None
    fallback: OptimSettings | None = None


YAML = """
run: {output_dir: out, num_steps: 100, autocast: no}
optim:
  peak_lr: 1e-3
  betas: [0.9, 0.99]
  clip_norm: .inf
mix: {draw: 1, ask: 0.5}
sizes: [3, 4]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "stage.yaml"
    file.write_text(YAML)
    return file


def test_file_defaults_and_overrides(path: Path) -> None:
    overrides = ["optim.peak_lr=2e-4", "run.seed=3", "warm_start=runs/x", "mix.look=2", "kind=2", "run.seed=4"]
    stage = load_settings(Stage, path, [*overrides, "tasks=[a, b]", "model.text_config.num_layers=4", "threshold=2"])
    assert stage.run == RunSettings(output_dir="out", num_steps=100, seed=4, autocast="no")
    assert stage.optim == OptimSettings(peak_lr=2e-4, betas=(0.9, 0.99), clip_norm=float("inf"))
    assert stage.warm_start == Path("runs/x")
    assert (stage.mix, stage.sizes, stage.kind) == ({"draw": 1.0, "ask": 0.5, "look": 2.0}, (3, 4), 2)
    assert isinstance(stage.mix["draw"], float)
    assert (stage.tasks, stage.model) == (["a", "b"], {"text_config": {"num_layers": 4}})
    assert isinstance(stage.threshold, int)
    assert load_settings(Stage, path, ["fallback.peak_lr=1"]).fallback == OptimSettings(peak_lr=1.0)
    assert load_settings(Stage, path, ["fallback=null"]).fallback is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.peek_lr=1", r"unknown key 'optim.peek_lr'; did you mean 'optim.peak_lr'\?"),
        ("optin.peak_lr=1", r"unknown key 'optin'; did you mean 'optim'\?"),
        ("zzz=1", "unknown key 'zzz'; the keys here are run, name"),
        ("run.num_steps=ten", r"run.num_steps is 'ten' \(str\); give a whole number"),
        ("run.num_steps=1e3", r"run.num_steps is 1000.0 \(float\); give a whole number"),
        ("run.num_steps=true", r"run.num_steps is True \(bool\)"),
        ("optim.peak_lr=true", r"optim.peak_lr is True \(bool\); give a number"),
        ("optim.peak_lr=fast", r"optim.peak_lr is 'fast' \(str\); give a number"),
        ("is_packed=1", r"is_packed is 1 \(int\); give true or false"),
        ("is_packed=yes", r"is_packed is 'yes' \(str\); give true or false"),
        ("name=5", r"name is 5 \(int\); give a string \(quote it"),
        ("name=null", r"name is None"),
        ("run.num_threads=two", r"run.num_threads is 'two' \(str\); give a whole number"),
        ("optim.optimizer=sgd", r"optim.optimizer is 'sgd' \(str\); give one of 'adamw', 'muon'"),
        ("kind=true", "kind is True"),
        ("optim.betas=[0.9]", r"optim.betas is \[0.9\] \(list\); give a list of 2 values"),
        ("optim.betas=[0.9, x]", r"optim.betas\[1\] is 'x'"),
        ("sizes=3", r"sizes is 3 \(int\); give a list"),
        ("tasks=draw", r"tasks is 'draw' \(str\); give a list"),
        ("mix.draw=much", r"mix.draw is 'much'"),
        ("mix=[1]", r"mix is \[1\] \(list\); give a mapping"),
        ("threshold=x", r"threshold is 'x'"),
        ("optim=fast", r"optim is 'fast' \(str\); give a mapping with the keys of OptimSettings"),
        ("sizes.0=3", r"override 'sizes.0=3': sizes is \[3, 4\], which has no keys"),
        ("run.seed", "override 'run.seed' has no value; write it as key=value"),
        ("sizes=[3", r"override 'sizes=\[3': '\[3' is not a valid YAML value"),
        ("run=null", r"run is None"),
        ("optim.decay_fraction=1.5", "OptimSettings.decay_fraction is 1.5; give a fraction from 0 to 1"),
        ("optim.betas=[0.9, 1]", r"OptimSettings.betas is \(0.9, 1.0\)"),
        ("run.log_every=0", "RunSettings.log_every is 0; give at least 1"),
    ],
)
def test_mistake_is_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(Stage, path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "missing key 'run'; Stage needs it"),
        ("run: {output_dir: out}", "missing key 'run.num_steps'; RunSettings needs it"),
        ("[1, 2]", r"holds \[1, 2\]; a settings file is a mapping"),
        ("a: [", "is not valid YAML"),
        ("name: x\nname: y", "key 'name' is given twice"),
        ("5: x", "unknown key '5'"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(Stage, file)


def test_saved_settings_read_back_the_same(path: Path, tmp_path: Path) -> None:
    """Strings that look like other scalars included."""
    overrides = ["optim.peak_lr=1e-5", "warm_start=runs/x", "tasks=['1e3', 'true', no, '07', '~', '', 'a: b']"]
    stage = load_settings(Stage, path, overrides)
    assert stage.tasks == ["1e3", "true", "no", "07", "~", "", "a: b"]
    save(stage, tmp_path / "deep" / "saved.yaml")
    assert load_settings(Stage, tmp_path / "deep" / "saved.yaml") == stage
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["saved.yaml"]
    assert to_dict(stage)["optim"]["betas"] == [0.9, 0.99]


def test_differences_name_keys() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == ["a.c 2 -> 4", "d 3 -> None", "e None -> 5"]


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Middle:
    inner: Inner = Inner(3, "b")
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outer:
    middle: Middle = Middle(Inner(5, "c"), 2.0)


def test_a_part_that_is_named_in_part_keeps_its_other_defaults() -> None:
    assert load_settings(Outer, os.devnull, ["middle.inner.name=d"]) == Outer(Middle(Inner(5, "d"), 2.0))
    assert load_settings(Middle, os.devnull, ["inner.size=4"]) == Middle(Inner(4, "b"))
    with pytest.raises(ValueError, match=r"missing key 'size'; Inner needs it"):
        load_settings(Inner, os.devnull, ["name=d"])
