"""The shape of the code: layers, cycles, sizes. A change that needs more edits the number here and says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("orthus", "train", "eval", "demo") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
# Without the inside of the small world, which is one of many data sets, and without `generate`, which the model class inherits: a
# batch passes none of it. Raised when LoRA, foreign backbones, self-contained folders and samplers came, for the same reason, and
# when evaluations during a run, its reports and split layers came, and what MFU counts of a batch.
MAX_TRAINING_FILES, MAX_TRAINING_LINES = 34, 6400
# Top of the list may import what is below it, never above.
LAYERS = [
    ("demo", "eval", "train"),
    ("orthus.lmms_eval",),
    ("orthus.harness",),
    ("orthus.training.stages",),
    ("orthus.training",),
    ("orthus.base_model",),
    ("orthus.building", "orthus.backbones"),
    ("orthus.data.packing", "orthus.data.pictures"),
    ("orthus.serving",),
    ("orthus.serving_tasks",),
    ("orthus.serving_queue", "orthus.serving_requests"),
    ("orthus.streaming",),
    ("orthus.processing",),
    ("orthus.prompts",),
    ("orthus.data", "orthus.image_processing", "orthus.tokenization"),
    ("orthus.modeling",),
    ("orthus.autoencoder_loading",),
    ("orthus.loading",),
    ("orthus.generation", "orthus.adapters"),
    ("orthus.decoding",),
    ("orthus.continuation",),
    ("orthus.backbone_rows",),
    ("orthus.foreign_autoencoders",),
    ("orthus.diffusion_head", "orthus.soft_vq", "orthus.autoencoder", "orthus.text_head"),
    ("orthus.sampling",),
    ("orthus.acceleration",),
    ("orthus.diffusion", "orthus.configuration"),
    ("orthus.conversion", "orthus.remote_code"),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports when it is loaded (imports under TYPE_CHECKING do not run)."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    known = {module_name(file) for file in FILES}
    return (found & known) - {module_name(path)}


def layer_of(name: str) -> int:
    matches = [
        (len(prefix), level)
        for level, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(prefix + ".")
    ]
    assert matches, f"{name} belongs to no layer"
    return max(matches)[1]


def test_imports_point_downwards() -> None:
    for path in FILES:
        name = module_name(path)
        if name == "orthus":
            continue
        for target in imports(path) - {"orthus"}:
            assert layer_of(target) >= layer_of(name), f"{name} imports {target}, which is above it"


def test_no_import_cycles() -> None:
    graph = {module_name(path): imports(path) - {"orthus"} for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES, f"{len(lines)} lines"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines below its docstring"
    assert path.stem not in ("utils", "common", "misc", "helpers")


def test_a_batch_can_be_followed_from_yaml_to_loss() -> None:
    """Where examples come from, how a model draws, how pictures are graded and what a dry run says is not on the way."""
    drawing = {"orthus", "orthus.generation", "orthus.sampling", "orthus.backbone_rows", "orthus.training.planning"}
    origins = ("orthus.data.world", "orthus.data.sources", "orthus.data.latents", "eval.")
    reached: set[str] = set()
    pending = {"train.posttrain"}
    by_name = {module_name(path): path for path in FILES}
    while pending:
        name = pending.pop()
        reached.add(name)
        pending |= {target for target in imports(by_name[name]) - reached - drawing if not target.startswith(origins)}
    num_lines = sum(len(by_name[name].read_text().splitlines()) for name in reached)
    assert len(reached) <= MAX_TRAINING_FILES and num_lines <= MAX_TRAINING_LINES, (len(reached), num_lines)
