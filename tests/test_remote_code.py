"""Auto classes after `import orthus`, and folders that load with `trust_remote_code=True` where `orthus` cannot be imported."""

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from remote_probe import results
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import orthus
from orthus import OrthusConfig, OrthusForConditionalGeneration, OrthusProcessor, remote_code
from orthus.image_processing import OrthusImageProcessor

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "orthus-small"
PROBE = Path(__file__).parent / "remote_probe.py"
JSON_FILES = ("config.json", "processor_config.json", "tokenizer_config.json")
needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint yet")


def register_all() -> None:
    OrthusConfig.register_for_auto_class()
    OrthusForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    OrthusProcessor.register_for_auto_class()


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote_code, "REGISTERED", {})
    yield
    classes = (OrthusConfig, OrthusForConditionalGeneration, OrthusProcessor, OrthusImageProcessor)
    assert all(cls._auto_class is None for cls in classes), "transformers would copy files as they are"


@pytest.fixture(scope="module")
def parts() -> tuple[OrthusForConditionalGeneration, OrthusProcessor]:
    return OrthusForConditionalGeneration.from_pretrained(str(CHECKPOINT)), OrthusProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def expected(parts: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    return results(*parts)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def texts(folder: Path, *patterns: str) -> dict[str, str]:
    return {path.name: path.read_text() for pattern in patterns for path in sorted(folder.glob(pattern))}


# ---------------------------------------------------------------------- auto classes after `import orthus`


@needs_checkpoint
def test_auto_classes_load_what_our_classes_load(parts: tuple[Any, Any], expected: dict[str, torch.Tensor]) -> None:
    assert type(AutoConfig.from_pretrained(CHECKPOINT)) is OrthusConfig
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert type(processor) is OrthusProcessor and processor.to_dict() == parts[1].to_dict()
    image_processor = AutoImageProcessor.from_pretrained(CHECKPOINT)
    assert type(image_processor) is OrthusImageProcessor and image_processor.to_dict() == parts[1].image_processor.to_dict()
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    assert type(model) is OrthusForConditionalGeneration
    assert_same(results(model, processor), expected)


@needs_checkpoint
@pytest.mark.parametrize("name", remote_code.MODEL_AUTO_CLASSES)
def test_every_auto_class_of_the_model(name: str, parts: tuple[Any, Any]) -> None:
    model = getattr(transformers, name).from_pretrained(CHECKPOINT)
    assert type(model) is OrthusForConditionalGeneration
    assert_same(model.state_dict(), parts[0].state_dict())


# ---------------------------------------------------------------------- without orthus


@needs_checkpoint
def test_a_process_without_orthus_answers_and_draws_the_same(
    tmp_path: Path, parts: tuple[Any, Any], expected: dict[str, torch.Tensor]
) -> None:
    folder, again, output, elsewhere = (tmp_path / name for name in ("saved model 1.0", "again", "results.pt", "elsewhere"))
    register_all()
    for part in parts:
        part.save_pretrained(folder)
    elsewhere.mkdir()
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))} | hub
    command = [sys.executable, "-I", str(PROBE), str(folder), str(again), str(output)]
    done = subprocess.run(
        command, env=environment, cwd=elsewhere, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(output), expected)
    # What the other process saved again is complete: the same code, pointed to by the same auto_map.
    assert texts(again, "*.py") == texts(folder, "*.py") == remote_code.remote_code()
    for name in ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


@needs_checkpoint
def test_code_is_complete_whichever_is_saved_first(tmp_path: Path, parts: tuple[Any, Any]) -> None:
    register_all()
    model, processor = parts
    model.save_pretrained(tmp_path / "a")
    assert texts(tmp_path / "a", "*.py") == remote_code.remote_code()
    processor.save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "b")
    assert texts(tmp_path / "b", "*.py") == remote_code.remote_code()
    model.save_pretrained(tmp_path / "b")
    assert texts(tmp_path / "a", "*.py", "*.json") == texts(tmp_path / "b", "*.py", "*.json")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "init_orthus.OrthusForConditionalGeneration"
    assert model.config.to_dict().keys() == OrthusConfig.from_pretrained(CHECKPOINT).to_dict().keys()  # saving changes no object


@needs_checkpoint
def test_without_registering_nothing_is_added(tmp_path: Path, parts: tuple[Any, Any]) -> None:
    for part in parts:
        part.save_pretrained(tmp_path / "plain")
    assert not texts(tmp_path / "plain", "*.py")
    register_all()
    for part in parts:
        part.save_pretrained(tmp_path / "code")
    for name in JSON_FILES:
        fields = json.loads((tmp_path / "code" / name).read_text())
        for part in (fields, fields.get("image_processor", {})):
            assert bool(part.pop("auto_map", None)) == (name != "tokenizer_config.json" and part != {}), name
        assert fields == json.loads((tmp_path / "plain" / name).read_text()), name


@needs_checkpoint
def test_an_auto_map_does_not_outlive_its_code(tmp_path: Path, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    register_all()
    for part in parts:
        part.save_pretrained(tmp_path / "code")
    monkeypatch.setattr(remote_code, "REGISTERED", {})
    loaded = (AutoModelForImageTextToText.from_pretrained(tmp_path / "code"), AutoProcessor.from_pretrained(tmp_path / "code"))
    assert type(loaded[0]) is OrthusForConditionalGeneration and type(loaded[1]) is OrthusProcessor  # ours, without asking
    for part in loaded:
        part.save_pretrained(tmp_path / "plain")
    assert not texts(tmp_path / "plain", "*.py")
    assert not any("auto_map" in text for text in texts(tmp_path / "plain", "*.json").values())


def test_image_processor_alone(tmp_path: Path) -> None:
    OrthusImageProcessor.register_for_auto_class()
    OrthusImageProcessor(size=16).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert fields["auto_map"]["AutoImageProcessor"] == "init_orthus.OrthusImageProcessor"
    assert texts(tmp_path, "*.py") == remote_code.remote_code()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is OrthusImageProcessor


def test_registering_refuses_what_could_not_be_loaded() -> None:
    with pytest.raises(ValueError, match="AutoModelForOrthus"):
        OrthusForConditionalGeneration.register_for_auto_class("AutoModelForOrthus")
    with pytest.raises(ValueError, match="not part of orthus"):
        type("Mine", (OrthusProcessor,), {"__module__": "mine"}).register_for_auto_class()  # type: ignore[attr-defined]
    assert not remote_code.REGISTERED


# ---------------------------------------------------------------------- the files


def test_code_can_be_added_to_a_saved_folder(tmp_path: Path, model: OrthusForConditionalGeneration) -> None:
    model.save_pretrained(tmp_path)
    paths = remote_code.write_remote_code(tmp_path)
    assert texts(tmp_path, "*.py") == {path.name: path.read_text() for path in paths} == remote_code.remote_code()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"].keys() == remote_code.AUTO_CLASSES.keys()
    OrthusForConditionalGeneration.register_for_auto_class(transformers.AutoModelForCausalLM)  # one more, at the user's wish
    model.config.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    assert entry == "init_orthus.OrthusForConditionalGeneration"


def test_only_our_own_files_are_overwritten(tmp_path: Path, model: OrthusForConditionalGeneration) -> None:
    model.save_pretrained(tmp_path)
    before = texts(tmp_path, "*.json")
    (tmp_path / "modeling_orthus.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"modeling_orthus\.py, not written by orthus"):
        remote_code.write_remote_code(tmp_path)
    assert texts(tmp_path, "*.json") == before and list(texts(tmp_path, "*.py")) == ["modeling_orthus.py"]
    stale = f"{remote_code.MARK} 0.0.1 from orthus/modeling.py\nx = 1\n"
    for name in ("modeling_orthus.py", "dropped_orthus.py"):
        (tmp_path / name).write_text(stale)
    (tmp_path / "my_orthus.py").write_text("x = 1\n")
    remote_code.write_remote_code(tmp_path)
    assert texts(tmp_path, "*.py") == remote_code.remote_code() | {"my_orthus.py": "x = 1\n"}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save the model"):
        remote_code.write_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    with pytest.raises(ValueError, match="chameleon"):
        remote_code.write_remote_code(tmp_path)
    assert not texts(tmp_path, "*.py")


def test_files_are_what_transformers_will_look_for(tmp_path: Path) -> None:
    files = remote_code.remote_code()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert text.startswith(f"{remote_code.MARK} {orthus.__version__} from orthus/")
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        wanted = {node.module or alias.name for node in nodes for alias in node.names}
        assert {*get_relative_imports(tmp_path / name)} == wanted and {f"{module}.py" for module in wanted} <= files.keys(), name
    entry = tmp_path / f"{remote_code.ENTRY}.py"
    found = {Path(path).name for path in get_relative_import_files(entry)} | {entry.name}
    assert found == files.keys()
    assert {*remote_code.AUTO_CLASSES.values()} <= {*orthus.__all__}  # the entry has them
    packages = {package for name in files for package in get_imports(tmp_path / name)} - {*sys.stdlib_module_names}
    assert packages <= {"torch", "transformers", "safetensors", "einops", "numpy", "PIL", "huggingface_hub", "tokenizers"}
    assert {"modeling_orthus.py", "processing_orthus.py", "data_schema_orthus.py"} <= files.keys()
    assert not [name for name in files if name.startswith(("training", "data_world", "data_packing", "building"))]


SOURCES = {
    "__init__.py": '__version__ = "1.2"\nfrom orthus import (\n    a as _a,  # noqa\n)\n\nvalue = _a.value\nlater = _a.later\n',
    "a.py": (
        '"""A."""\n\nfrom __future__ import annotations\n\nfrom typing import TYPE_CHECKING\n\n'
        "from orthus import c\nfrom orthus.sub import b, names\nfrom orthus.sub.b import (\n    ONE,\n    TWO as two,\n)\n\n"
        "if TYPE_CHECKING:\n    from orthus.typed import Kind\n\n"
        "value = (ONE, two, b.ONE, names, c.THREE)\n\n\n"
        "def later() -> Kind:\n    import no_such_package  # optional\n    from orthus.lazy import FOUR\n\n    return FOUR\n"
    ),
    "c.py": "THREE = 3\n",
    "lazy.py": "FOUR = 4\n",
    "typed.py": "Kind = int\n",
    "unused.py": "raise AssertionError\n",
    "sub/__init__.py": "names = 'sub'\n",
    "sub/b.py": "ONE, TWO = 1, 2\n",
}


def test_every_form_of_import_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SOURCES.items():
        path = tmp_path / "orthus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(remote_code, "PACKAGE", tmp_path / "orthus")
    files = remote_code.remote_code()
    wanted = {"init", "a", "c", "lazy", "typed", "sub_init", "sub_b"}
    assert files.keys() == {f"{name}_orthus.py" for name in wanted}
    assert files["a_orthus.py"].startswith("# Generated by orthus 1.2 from orthus/a.py; ")
    flat = tmp_path / "flat_for_test"
    flat.mkdir()
    for name, text in files.items():
        (flat / name).write_text(text)
    assert {*get_relative_imports(flat / "a_orthus.py")} == {f"{name}_orthus" for name in wanted - {"init", "a"}}
    assert "no_such_package" not in get_imports(flat / "a_orthus.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.import_module("flat_for_test.init_orthus")
    assert entry.value == (1, 2, 1, "sub", 3)
    with pytest.raises(ImportError, match="no_such_package"):
        entry.later()


def test_an_import_that_cannot_be_rewritten_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "orthus").mkdir()
    monkeypatch.setattr(remote_code, "PACKAGE", tmp_path / "orthus")
    for line in ("import orthus.modeling", "from . import modeling"):
        (tmp_path / "orthus" / "__init__.py").write_text(f'__version__ = "1"\n{line}\n')
        with pytest.raises(AssertionError, match=r"__init__\.py:2: write 'from orthus"):
            remote_code.remote_code()
